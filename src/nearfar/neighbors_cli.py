"""The command that lists the neighbours of 10⁵ to 10⁸ rows in files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfar import terminal

if TYPE_CHECKING:
    import numpy as np


neighbors_app = typer.Typer()


@neighbors_app.command(
    epilog=terminal.example("nearfar neighbors vectors.parquet --view text -o near/ --k 100")
)
def neighbors(
    source: Annotated[
        Path,
        typer.Argument(help="Vectors: a .npy file, a folder of .npy shards, or what nearfar embed writes."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    view: Annotated[
        str | None, typer.Option(help="The column of vectors, where the source is no .npy.")
    ] = None,
    k: Annotated[int, typer.Option(help="Neighbours of each row.")] = 100,
    recall: Annotated[float, typer.Option(help="Recall of the search, at least; it is measured.")] = 0.95,
    metric: Annotated[str, typer.Option(help="cosine or dot.")] = "cosine",
    processes: Annotated[int, typer.Option(help="Processes that add shards and search.")] = 1,
    engine: Annotated[
        str,
        typer.Option(help="processes, or ray: pieces are added and searched on the nodes of a Ray cluster."),
    ] = "processes",
    seed: Annotated[int, typer.Option(help="Seed of the cells and of the measured queries.")] = 0,
) -> None:
    """List the nearest neighbours of 10⁵ to 10⁸ rows in files, for hard batches.

    A call that was stopped goes on when it is repeated. In Python: MappedNeighbors(FOLDER), which HardNegativeSampler
    and PartitionBatchSampler take.
    """
    import re
    import shutil

    from nearfar.batching import nearest_neighbors_on_disk
    from nearfar.batching.mapped_neighbors import HEAD
    from nearfar.data.vector_shards import shards_of_table
    from nearfar.errors import NearfarError

    ids: np.ndarray | None = None
    vectors, beside = source, output.with_name(f"{output.name}.vectors")
    if not source.is_dir() and source.suffix.lower() != ".npy":
        if view is None:
            raise NearfarError(f"{source}: name the column of vectors with --view NAME, or give .npy files.")
        if (output / HEAD).exists():
            raise NearfarError(f"{output} holds neighbours already: remove it, or name a new folder with -o.")
        if beside.exists() and (
            strange := [p.name for p in beside.iterdir() if not re.fullmatch(r"\d{5,}\.npy", p.name)]
        ):
            raise NearfarError(
                f"{beside} is where the vectors are kept meanwhile, and it holds {strange[0]}: move that, or name a "
                "different folder with -o."
            )
        vectors, ids = beside, shards_of_table(source, view, beside, "--view NAME")
    try:
        near = nearest_neighbors_on_disk(
            vectors,
            k,
            output,
            metric=metric,
            min_recall=recall,
            processes=processes,
            engine=engine,
            seed=seed,
            ids=ids,
        )
    except NearfarError:  # of a call that was stopped they stay
        if vectors is beside:
            shutil.rmtree(beside)
        raise
    if vectors is beside:
        shutil.rmtree(beside)
    terminal.say(
        terminal.console(),
        f"{output}: {near.k} neighbours of {near.n:,} rows ({near.index}); recall {near.recall:.4f} on {near.queries} "
        "queries",
    )
