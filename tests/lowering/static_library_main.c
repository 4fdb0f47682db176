/* Runs the model "small" on batches of one image, then on two: ./main WEIGHTS INPUT OUTPUT. INPUT holds three images.
 * Every call that must fail is tried too: what it says goes to standard output. */
#include "model.h"

#include <stdio.h>
#include <stdlib.h>

static char *content(const char *path, size_t *bytes) {
  FILE *file = fopen(path, "rb");
  char *data;
  if (file == NULL || fseek(file, 0, SEEK_END) != 0) exit(2);
  *bytes = (size_t)ftell(file);
  rewind(file);
  data = malloc(*bytes + 1);
  if (data == NULL || fread(data, 1, *bytes, file) != *bytes) exit(2);
  fclose(file);
  return data;
}

static void must(int code) {
  if (code == 0) return;
  printf("%s\n", small_error());
  exit(1);
}

static void refused(int64_t code) { printf("%s\n", code == -1 ? small_error() : "accepted"); }

int main(int count, char **arguments) {
  size_t weight_bytes, image_bytes;
  char *weights, *images, *output;
  FILE *file;
  int64_t shape[4] = {0, 3, 13, 10}, wrong[4] = {1, 3, 13, 11}, bytes;
  int batch;
  if (count != 4) return 2;
  weights = content(arguments[1], &weight_bytes);
  images = content(arguments[2], &image_bytes);
  refused(small_run());
  refused(small_load(weights, weight_bytes - 1));
  must(small_load(weights, weight_bytes));
  free(weights);
  refused(small_load(NULL, 0));
  refused(small_run());
  refused(small_output_bytes(0));
  refused(small_set_input(1, images, shape));
  must(small_set_input(0, images, wrong));
  refused(small_run());
  file = fopen(arguments[3], "wb");
  for (batch = 1; batch < 3; ++batch) {
    shape[0] = batch;
    must(small_set_input(0, images + (batch - 1) * image_bytes / 3, shape));
    must(small_run());
    bytes = small_output_bytes(0);
    refused(small_get_output(0, images, (size_t)bytes - 4));
    printf("%d axes of %d\n", (int)small_output_extent(0, 3), (int)small_output_extent(0, 0));
    output = malloc((size_t)bytes);
    must(small_get_output(0, output, (size_t)bytes));
    fwrite(output, 1, (size_t)bytes, file);
    free(output);
  }
  fclose(file);
  small_unload();
  refused(small_run());
  return 0;
}
