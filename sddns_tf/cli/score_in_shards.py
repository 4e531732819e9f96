"""`sddns score --runner=...`: the same answers from any number of processes and machines."""

from __future__ import annotations

import logging
import pathlib
import shlex
from argparse import Namespace

from sddns_tf.cli import starting
from sddns_tf.cli.console import require, say
from sddns_tf.cli.errors import UsageError, user_input
from sddns_tf.cli.score import image_paths, summary
from sddns_tf.cli.scorers import saved_model_folder


def run(options: Namespace, kind: str) -> int:
    """Score the images that the options of `sddns score` name.

    Args:
        options: From the command's parser.
        kind: `"csv"` or `"parquet"`.

    Returns:
        Exit code: 2 if some images were not scored, in this run or an earlier one.
    """
    require(options, "output")
    if kind == "jsonl":
        raise UsageError("--format must be csv or parquet with --runner. Received: jsonl")
    model = options.model
    if "://" not in model:
        model = saved_model_folder(pathlib.Path(model).expanduser())
    if model is None:
        raise UsageError(
            f"--model must be the folder of a SavedModel with --runner. Received: {options.model}"
        )
    images = options.images
    if images == "-" or images.startswith(("folder:", "list:")):
        images = image_paths(images)
    starting.import_tensorflow()
    logging.getLogger().setLevel(logging.ERROR)  # Beam warns about parts that are not installed.
    with user_input("runner", ImportError):
        from sddns_tf import beam
    with user_input():
        job = beam.ScoringJob(
            model,
            images,
            options.output,
            format=kind,
            batch_size=options.batch_size,
            images_per_shard=options.images_per_shard,
            threads=options.threads,
            runner=options.runner,
            options=shlex.split(options.runner_options),
        )
    with user_input(kinds=beam.WorkerLostError):
        totals = job.run()
    say(f"{totals.shards} shards, {totals.done_before} of them done before")
    say(summary(totals.images, totals.flagged, totals.failed))
    return 2 if totals.with_errors else 0
