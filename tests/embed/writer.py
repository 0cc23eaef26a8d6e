"""A writer in a process of its own: ``python writer.py PHOTOS STORE COMMIT_SECONDS UPKEEP [I N]``.

Prints each image once it is reported as stored. Commits often, and with UPKEEP "1" compacts and
cleans after each commit.
"""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from tinyvit.embed import commits, embed_images, run, work


def main():
    photos, url, seconds, upkeep, *part = sys.argv[1:]
    run.COMMIT_SECONDS = float(seconds)
    if upkeep == "1":
        run.COMMITS_BETWEEN, commits.KEPT = 1, timedelta(0)
    deadly = os.environ.get("DEADLY_IMAGE")
    if deadly:
        prepare = work.prepare

        def crash(file, spec, **options):
            if file.name.endswith(deadly):
                os.kill(os.getpid(), signal.SIGKILL)
            return prepare(file, spec, **options)

        work.prepare = crash

    def tell(outcome):
        print(outcome.state, outcome.path, flush=True)

    print("ready", flush=True)
    embed_images(
        photos,
        url,
        tiny.make_tiny_engine(),
        part=tuple(map(int, part)) if part else (0, 1),
        tell=tell,
    )


if __name__ == "__main__":
    main()
