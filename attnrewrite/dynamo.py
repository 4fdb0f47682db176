"""attnrewrite inside torch.compile: a backend, and the same passes for people who keep a backend of their own.

    module = torch.compile(module, backend="attnrewrite")                       # rewritten, then Inductor

    torch._inductor.config.pre_grad_custom_pass = attnrewrite.dynamo.GraphPass()    # before Inductor's own passes
    torch.compile(module, backend=attnrewrite.dynamo.rewriting(my_backend))         # before any other backend

Parameters are read anew at every call, so training goes on as before. Buffers (masks, index tables) are taken as they
are when the model is compiled; a call that finds one written to since then compiles anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch._dynamo.source import SyntheticLocalSource
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from attnrewrite.errors import AttnRewriteError
from attnrewrite.frontend.fx.program import Lifted, known_as
from attnrewrite.modules import Rewritten, as_module, prepare_kernels, rewrite
from attnrewrite.pipeline import Pipeline, select

logger = logging.getLogger(__name__)

Compiled = Callable[..., Any]
Backend = Callable[[GraphModule, Sequence[Any]], Compiled]


def backend(module: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Compiled:
    """Backend of torch.compile: rewrites the graph and hands it to Inductor.

    options: `passes`, a Pipeline or names in order; the rest is Inductor's (`torch.compile(..., options={...})`).
    """
    from torch._inductor.compile_fx import compile_fx

    chosen = options.pop("options", None) or {}
    passes = chosen.pop("passes", None) if isinstance(chosen, dict) else None
    settings = {**chosen, **{k: v for k, v in options.items() if k != "mode"}} or None

    def inductor(graph: GraphModule, inputs: Sequence[Any]) -> Compiled:
        return cast(Compiled, compile_fx(graph, list(inputs), config_patches=settings))

    return rewriting(inductor, passes)(module, example_inputs)


def rewriting(inner: Backend, passes: Pipeline | Sequence[str] | None = None) -> Backend:
    """A backend that rewrites the graph before `inner`, any backend of torch.compile, sees it."""

    def compiled(module: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        done = rewritten(module, example_inputs, lifted_by_dynamo(module, example_inputs), passes)
        if done is None or not done.outcome.modified:
            return inner(module, example_inputs)
        prepare_kernels(as_module(done.model))
        return _watching(inner(as_module(done.model), example_inputs), done, module, example_inputs, compiled)

    return compiled


def rewritten(
    module: GraphModule,
    example_inputs: Sequence[Any],
    lifted: Sequence[Lifted],
    passes: Pipeline | Sequence[str] | None = None,
) -> Rewritten | None:
    """The graph through the passes; None, with a word in the log, where it cannot be read."""
    pipeline = passes if isinstance(passes, Pipeline) else select(passes)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    # What Dynamo traced with knows which sizes are symbolic; real inputs do not.
    inputs = [n.meta.get("example_value", given) for n, given in zip(placeholders, example_inputs, strict=True)]
    try:
        done = rewrite(module, inputs, pipeline=pipeline, freeze=False, lifted=lifted)
    except AttnRewriteError as error:
        logger.warning("the graph is compiled as it is: %s", error)
        return None
    _name_sources(module, as_module(done.model))
    for site in done.outcome.sites:
        logger.info("%s: %s, %s: %s", site.node, site.kind, site.verdict, site.reason)
    return done


def _name_sources(module: GraphModule, rewritten: GraphModule) -> None:
    """Tell AOTAutograd where the tensors of a Dynamo graph come from, the rewrite's own constants among them."""
    known = getattr(module, "_param_name_to_source", None)
    if known is not None:
        added = {name: SyntheticLocalSource(name) for name, _ in rewritten.named_buffers() if name not in known}
        rewritten._param_name_to_source = {**known, **added}  # type: ignore[assignment]


def lifted_by_dynamo(module: GraphModule, example_inputs: Sequence[Any]) -> list[Lifted]:
    """The placeholders of a Dynamo graph that are tensors of the model, which Dynamo marks as static."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    return [
        Lifted(node.name, tensor, isinstance(tensor, torch.nn.Parameter))
        for node, tensor in zip(placeholders, example_inputs, strict=True)
        if isinstance(tensor, torch.Tensor) and getattr(tensor, "_dynamo_static_input_type", None) is not None
    ]


def _watching(
    run: Compiled, done: Rewritten, module: GraphModule, example_inputs: Sequence[Any], compile_again: Backend
) -> Compiled:
    """`run`, compiled anew where a buffer whose contents were read has been written to or replaced."""
    read, trained = done.constants(), {t.name for t in lifted_by_dynamo(module, example_inputs) if t.trained}
    placeholders = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    watched = [i for i, name in enumerate(placeholders) if name in read - trained]
    if not watched:
        return run
    state: dict[str, Any] = {"run": run, "seen": _versions(example_inputs, watched)}

    def checked(*inputs: Any) -> Any:
        seen = _versions(inputs, watched)
        if seen != state["seen"]:
            state["run"], state["seen"] = compile_again(module, inputs), seen
        return state["run"](*inputs)

    return checked


def _versions(inputs: Sequence[Any], watched: Sequence[int]) -> list[tuple[int, int]]:
    """Where the tensors lie and how often they were written to."""
    return [(inputs[i].data_ptr(), 0 if inputs[i].is_inference() else inputs[i]._version) for i in watched]


class GraphPass(CustomGraphPass):
    """The passes as Inductor's `pre_grad_custom_pass`, for inference and training.

    Behind autograd (`post_grad_custom_pre_pass`) a graph no longer says what its index tables and masks hold, so there
    is nothing to match there.
    passes: a Pipeline or names in order; all by default.
    """

    def __init__(self, passes: Pipeline | Sequence[str] | None = None) -> None:
        self._passes = passes

    def __call__(self, graph: Graph) -> None:
        module = graph.owning_module
        assert module is not None
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        inputs = [known_as(n) for n in placeholders]
        if any(value is None for value in inputs):
            logger.warning("the graph is compiled as it is: it does not say the shapes of its inputs")
            return
        known = [n.meta["grapharg"].example if "grapharg" in n.meta else None for n in placeholders]
        done = rewritten(module, inputs, lifted_by_dynamo(module, known), self._passes)
        if done is None or not done.outcome.modified:
            return
        own, new = dict(module.named_buffers()), as_module(done.model)
        for name, buffer in new.named_buffers():
            if name not in own:
                module.register_buffer(name, buffer, persistent=False)
        _name_sources(module, module)
        module.graph = new.graph

    def uuid(self) -> Any:
        """None: what is rewritten depends on the contents of buffers, which Inductor's cache does not look at."""
        return None
