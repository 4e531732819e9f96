/* Runs one signature of a SavedModel through TensorFlow's C interface, as TensorFlow Serving loads
 * it: from a session, with neither Python nor Keras.
 *
 *   load_saved_model EXPORT THREADS RUNS IMAGES HEIGHT WIDTH PIXELS INPUT OUTPUT...
 *   load_saved_model EXPORT THREADS RUNS 0 0 0 FILE,FILE,... INPUT OUTPUT...
 *
 * PIXELS is a file of uint8 values of shape (IMAGES, HEIGHT, WIDTH, 3), each FILE an image file,
 * INPUT and OUTPUT are operations of the signature, as NAME:INDEX. Every thread runs the signature
 * RUNS times; each time must give what the first one gave. Prints a line for each output.
 */

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tensorflow/c/c_api.h"

#define MOST 16

static TF_Session *session;
static TF_Output input, outputs[MOST];
static TF_Tensor *input_tensor, *first[MOST];
static int output_count, runs;

static void check(TF_Status *status, const char *what) {
  if (TF_GetCode(status) != TF_OK) {
    fprintf(stderr, "%s: %s\n", what, TF_Message(status));
    exit(1);
  }
}

static void *read_file(const char *path, size_t *size) {
  FILE *file = fopen(path, "rb");
  if (!file) {
    perror(path);
    exit(1);
  }
  fseek(file, 0, SEEK_END);
  *size = ftell(file);
  rewind(file);
  void *data = malloc(*size + 1);
  if (fread(data, 1, *size, file) != *size) exit(1);
  fclose(file);
  return data;
}

static TF_Tensor *pixels(const char *path, const int64_t shape[4]) {
  size_t size;
  void *data = read_file(path, &size);
  TF_Tensor *tensor = TF_AllocateTensor(TF_UINT8, shape, 4, size);
  memcpy(TF_TensorData(tensor), data, size);
  free(data);
  return tensor;
}

static TF_Tensor *image_files(char *paths) {
  int64_t count = 1;
  for (char *c = paths; *c; c++) count += *c == ',';
  TF_Tensor *tensor = TF_AllocateTensor(TF_STRING, &count, 1, count * sizeof(TF_TString));
  TF_TString *string = TF_TensorData(tensor);
  for (char *path = strtok(paths, ","); path; path = strtok(NULL, ","), string++) {
    size_t size;
    void *data = read_file(path, &size);
    TF_StringInit(string);
    TF_StringCopy(string, data, size);
    free(data);
  }
  return tensor;
}

static TF_Output operation(TF_Graph *graph, char *name) {
  char *colon = strrchr(name, ':');
  if (colon) *colon = 0;
  TF_Output output = {TF_GraphOperationByName(graph, name), colon ? atoi(colon + 1) : 0};
  if (!output.oper) {
    fprintf(stderr, "no operation %s\n", name);
    exit(1);
  }
  return output;
}

static void run(TF_Tensor **results) {
  TF_Status *status = TF_NewStatus();
  TF_SessionRun(session, NULL, &input, &input_tensor, 1, outputs, results, output_count, NULL, 0,
                NULL, status);
  check(status, "run");
  TF_DeleteStatus(status);
}

static void *run_often(void *unused) {
  for (int i = 0; i < runs; i++) {
    TF_Tensor *results[MOST];
    run(results);
    for (int k = 0; k < output_count; k++) {
      int same = TF_TensorByteSize(results[k]) == TF_TensorByteSize(first[k]);
      if (same && TF_TensorType(first[k]) != TF_STRING)
        same = !memcmp(TF_TensorData(results[k]), TF_TensorData(first[k]),
                       TF_TensorByteSize(first[k]));
      if (!same) {
        fprintf(stderr, "another answer than the first in output %d\n", k);
        exit(1);
      }
      TF_DeleteTensor(results[k]);
    }
  }
  return unused;
}

static void print(TF_Tensor *tensor) {
  void *data = TF_TensorData(tensor);
  for (int64_t i = 0; i < TF_TensorElementCount(tensor); i++) {
    if (i) putchar('\t');
    if (TF_TensorType(tensor) == TF_FLOAT) printf("%.9g", ((float *)data)[i]);
    if (TF_TensorType(tensor) == TF_BOOL) printf("%d", ((unsigned char *)data)[i]);
    if (TF_TensorType(tensor) == TF_STRING) {
      TF_TString *string = (TF_TString *)data + i;
      fwrite(TF_StringGetDataPointer(string), 1, TF_StringGetSize(string), stdout);
    }
  }
  putchar('\n');
}

int main(int argc, char **argv) {
  if (argc < 10 || argc - 9 > MOST) return 2;
  TF_Status *status = TF_NewStatus();
  TF_Graph *graph = TF_NewGraph();
  const char *tags[] = {"serve"};
  session = TF_LoadSessionFromSavedModel(TF_NewSessionOptions(), NULL, argv[1], tags, 1, graph,
                                         NULL, status);
  check(status, "load");
  runs = atoi(argv[3]);
  int64_t shape[] = {atoi(argv[4]), atoi(argv[5]), atoi(argv[6]), 3};
  input_tensor = shape[0] ? pixels(argv[7], shape) : image_files(argv[7]);
  input = operation(graph, argv[8]);
  output_count = argc - 9;
  for (int k = 0; k < output_count; k++) outputs[k] = operation(graph, argv[9 + k]);

  run(first);
  for (int k = 0; k < output_count; k++) print(first[k]);
  int count = atoi(argv[2]);
  pthread_t *threads = malloc(count * sizeof(pthread_t));
  for (int i = 0; i < count; i++) pthread_create(&threads[i], NULL, run_often, NULL);
  for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
  return 0;
}
