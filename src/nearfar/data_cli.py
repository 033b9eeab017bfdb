"""``nearfar data`` (shards of spots, whatever an experiment reads) and ``nearfar neighbors`` (rows in files)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from nearfar import terminal

if TYPE_CHECKING:
    import numpy as np

__all__ = ["data_app", "neighbors_app"]


READ = "read"


class _Verbs(TyperGroup):
    """``nearfar data experiment=NAME …`` is ``nearfar data read experiment=NAME …``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # typer may bring its own click
        known = not args or args[0] in self.commands or "=" not in args[0]
        return super().resolve_command(ctx, args if known else [READ, *args])


data_app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    help="Read data and show what was taken and rejected (nearfar data experiment=NAME …), or write shards.",
    epilog=terminal.example("nearfar data experiment=pairs data.train=words.tsv"),
)


@data_app.command(epilog=terminal.example("nearfar data shards her2st/ shards/"))
def shards(
    source: Annotated[
        Path,
        typer.Argument(
            help="Slides: Space Ranger's outs, h5ad and pictures, or Spatial Transcriptomics (counts, spots, images)."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="The folder of shards; finished slides in it are kept.")],
    patch: Annotated[
        int, typer.Option(help="Side of what is cut around a spot, in pixels of the picture.")
    ] = 224,
    patch_um: Annotated[
        float | None, typer.Option(help="The same in micrometres, instead of --patch.")
    ] = None,
    pixels: Annotated[
        int | None, typer.Option(help="Side of the stored patch; by default as it is cut.")
    ] = None,
    quality: Annotated[int, typer.Option(help="Of the jpg, 1 to 100.")] = 90,
    genes: Annotated[
        str,
        typer.Option(help="The most variable of the training slides (a number), 'all', or a file of names."),
    ] = "2000",
    values: Annotated[
        str,
        typer.Option(
            help="log1p: normalised; counts: readers normalise and choose genes, leaving slides out."
        ),
    ] = "log1p",
    target_sum: Annotated[float, typer.Option(help="Counts of a spot after normalisation.")] = 1e4,
    min_counts: Annotated[int, typer.Option(help="Spots with fewer counts are rejected.")] = 10,
    neighbors: Annotated[int, typer.Option(help="Nearest spots that are written to each.")] = 6,
    val: Annotated[list[str] | None, typer.Option(help="A slide of the val split; may be repeated.")] = None,
    test: Annotated[
        list[str] | None, typer.Option(help="A slide of the test split; may be repeated.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the slides drawn for val.")] = 0.0,
    test_fraction: Annotated[float, typer.Option(help="Share of the slides drawn for test.")] = 0.0,
    split_by: Annotated[
        str, typer.Option(help="slide or patient: what is drawn, and must not be in two splits.")
    ] = "slide",
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
    patients: Annotated[
        str | None,
        typer.Option(
            help="A table with slide and patient, or a regular expression over slides' names, e.g. '^[A-H]'."
        ),
    ] = None,
    spots_per_shard: Annotated[int, typer.Option(help="Largest number of samples in a tar file.")] = 4096,
) -> None:
    """Write slides as WebDataset shards: patch, expression and neighbours of every spot, split by slide.

    Slides in the source's train_samples.txt, val_samples.txt and test_samples.txt are split so, unless options say
    otherwise. A second call goes on where the first stopped; the same input gives the same bytes.
    """
    from nearfar.data.slides.shards import ShardOptions, write_shards

    chosen = ShardOptions(
        patch=patch,
        patch_um=patch_um,
        pixels=pixels,
        quality=quality,
        genes=None if genes == "all" else int(genes) if genes.lstrip("-").isdigit() else Path(genes),
        values=values,  # type: ignore[arg-type]
        target_sum=target_sum,
        min_counts=min_counts,
        neighbors=neighbors,
        spots_per_shard=spots_per_shard,
        val=tuple(val or ()),
        test=tuple(test or ()),
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        split_by=split_by,  # type: ignore[arg-type]
        seed=seed,
        patients=patients,
    )
    with _progress() as watch:
        written = write_shards(source, output, chosen, watch)
    terminal.say(terminal.console(), written.summary())
    terminal.say(terminal.console(), f"shards: {output}")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Two bars: slides whose counts are read, spots that are written."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal.console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def watch(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                name = {"counts": "slides: counts", "shards": "spots: shards"}[stage]
                tasks[stage] = bar.add_task(name, total=total)
            bar.update(tasks[stage], completed=done)

        yield watch


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
