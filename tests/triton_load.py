"""Clients of KServe's protocol v2, run by the Python that has `tritonclient`: see test_triton.py.

Sends each image file of a folder in turn, one a request, from several clients at once, and prints
the answers, the milliseconds of each request and the seconds of all of them as JSON.
"""

import concurrent.futures
import functools
import itertools
import json
import pathlib
import sys
import time

import numpy as np


def ask(client, address, paths):
    """Return a client's answers: a row of file, milliseconds and outputs for each request."""
    server = client.InferenceServerClient(address)
    rows = []
    for path in paths:
        files = np.array([[path.read_bytes()]], dtype=object)
        image_bytes = client.InferInput("image_bytes", files.shape, "BYTES")
        image_bytes.set_data_from_numpy(files)
        start = time.perf_counter()
        answer = server.infer("parts", [image_bytes])
        row = {"file": path.name, "milliseconds": 1000 * (time.perf_counter() - start)}
        for name in ("ood_score", "p_value", "is_ood"):
            row[name] = answer.as_numpy(name)[0, 0].item()
        row["status"] = answer.as_numpy("status")[0, 0].decode()
        rows.append(row)
    return rows


def main(http, grpc, folder, clients, requests):
    """Print what the clients of both protocols received."""
    import tritonclient.grpc
    import tritonclient.http

    paths = sorted(pathlib.Path(folder).iterdir())
    orders = [np.roll(np.resize(paths, requests), client) for client in range(clients)]
    found = {}
    for name, address in (("http", http), ("grpc", grpc)):
        send = functools.partial(ask, getattr(tritonclient, name), address)
        send(paths)  # the first answers take longer
        start = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            rows = list(itertools.chain.from_iterable(pool.map(send, orders)))
        found[name] = {"seconds": time.perf_counter() - start, "rows": rows}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
