"""All models of the zoo, by name."""

from __future__ import annotations

from tests.zoo import other_models, spandrel_models, timm_models, torchvision_models, transformers_models
from tests.zoo.model import Model

FAMILIES = (timm_models, torchvision_models, transformers_models, spandrel_models, other_models)
MODELS: dict[str, Model] = {model.name: model for family in FAMILIES for model in family.MODELS}
assert len(MODELS) == sum(len(family.MODELS) for family in FAMILIES)

# Models whose verdicts are not reached yet: what is missing.
PENDING: dict[str, str] = {
    "timm_halonet": "blocks unfolded with their surroundings",
    "timm_efficientvit_msra": "a convolution of the queries inside each window",
    "efficientvit_m2": "a convolution of the queries inside each window",
    "timm_sam2_hiera": "queries pooled inside their window",
    "timm_hiera": "queries pooled inside their window",
    "timm_tnt": "windows that blocks keep in the batch",
}
assert PENDING.keys() <= MODELS.keys()
