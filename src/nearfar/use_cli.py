"""The commands that use a trained run: embed, predict, and those of search, export and serve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nearfar import terminal

if TYPE_CHECKING:
    from nearfar.data.chunks import NewData
    from nearfar.serving.stream import Written

use_app = typer.Typer()

Run = Annotated[Path, typer.Argument(help="A run folder, a checkpoint, an ensemble, or an exported folder.")]
Data = Annotated[Path, typer.Argument(help="A table, a folder, or whatever else the run's system reads.")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option("--column", help="NAME=HEADER: the column that a view is in; may be repeated."),
]
IdColumn = Annotated[
    str | None, typer.Option(help="The column of ids; by default the one that is called id, or row numbers.")
]
Encoding = Annotated[
    str | None, typer.Option(help="The encoding of a text file, e.g. cp1252; by default UTF-8.")
]
Images = Annotated[
    Path | None,
    typer.Option(help="The folder that names of pictures are relative to; by default the data's own."),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--set", help="NAME=VALUE: how the run's system reads the data; may be repeated."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto takes a GPU where there is one.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows that are computed at once.")]
# what the molecule system called these columns before every system could be used
SmilesColumn = Annotated[str | None, typer.Option(help="The same as --column molecule=HEADER.", hidden=True)]
TextColumn = Annotated[str | None, typer.Option(help="The same as --column text=HEADER.", hidden=True)]


def new_data(
    data: Path,
    column: Sequence[str] | None,
    id_column: str | None = None,
    encoding: str | None = None,
    images: Path | None = None,
    smiles_column: str | None = None,
    text_column: str | None = None,
    options: Sequence[str] | None = None,
) -> NewData:
    """The data that a command names, with its columns."""
    from nearfar.data.chunks import NewData
    from nearfar.errors import NearfarError

    columns, chosen = {}, {}
    for each in column or ():
        name, separator, header = each.partition("=")
        if not (separator and name and header):
            raise NearfarError(f"--column {each}: NAME=HEADER is needed, such as --column text=review.")
        columns[name] = header
    for each in options or ():
        name, separator, value = each.partition("=")
        if not (separator and name):
            raise NearfarError(f"--set {each}: NAME=VALUE is needed, such as --set min_score=0.3.")
        chosen[name] = value
    for name, earlier in (("molecule", smiles_column), ("text", text_column)):
        if earlier is not None:
            columns.setdefault(name, earlier)
    return NewData(data, columns, id_column, encoding, images=images, options=chosen)


_SHOWN = 16  # columns that are listed; expression has one for each gene


def _report(written: Written) -> None:
    console = terminal.console()
    named = [name for name in written.columns if name not in ("id", "row")]
    more = f", … {len(named)} columns" if len(named) > _SHOWN else ""
    columns = ", ".join(named[:_SHOWN]) + more
    terminal.say(console, f"{written.path}: {written.rows} rows ({columns})")
    if written.resumed:
        terminal.say(console, f"{written.resumed} parts were there from an earlier start")
    if len(written.rejections):
        terminal.say(console, written.rejections.summary())


@use_app.command(epilog=terminal.example("nearfar embed runs/NAME items.csv -o vectors.parquet"))
def embed(
    run: Run,
    data: Data,
    output: Annotated[Path, typer.Option("--output", "-o", help="What to write: .parquet or .npz.")] = Path(
        "vectors.parquet"
    ),
    tower: Annotated[
        list[str] | None,
        typer.Option("--tower", help="A view to embed; may be repeated. By default all that the data has."),
    ] = None,
    column: ColumnOption = None,
    id_column: IdColumn = None,
    encoding: Encoding = None,
    images: Images = None,
    batch_size: BatchSize = None,
    device: Device = "auto",
    options: Options = None,
    engine: Annotated[
        str, typer.Option(help="local: in this process. ray: in encoders on the nodes of a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="With --engine ray: how many encoders; by default one for each GPU, or else CPU."),
    ] = None,
    smiles_column: SmilesColumn = None,
    text_column: TextColumn = None,
) -> None:
    """Embed a file with a trained run: a unit vector of each view of each row.

    Tables are read as a stream. A command that was killed goes on where it was when it is given again.
    """
    from nearfar.errors import NearfarError
    from nearfar.serving import load
    from nearfar.serving.stream import embed_file

    source = new_data(data, column, id_column, encoding, images, smiles_column, text_column, options)
    if engine not in ("local", "ray"):
        raise NearfarError(f"--engine {engine}: local or ray is needed.")
    if engine == "local":
        if workers is not None:
            raise NearfarError("--workers counts encoders on a cluster: give --engine ray as well.")
        trained = load(run, device)
        with terminal.progress_bar(None) as advance:
            written = embed_file(
                trained, source, output, towers=tower, batch_size=batch_size, advance=advance
            )
        _report(written)
        return
    from nearfar.cluster import connect
    from nearfar.serving.ray_pool import RayPool

    console = terminal.console()
    with connect("--engine ray", cpus=workers or 1):
        trained = load(run, "cpu")  # it reads the data; the encoders compute
        pool = RayPool(trained, device, workers, lambda text: terminal.say(console, text))
        with terminal.progress_bar(None) as advance:
            written = embed_file(
                trained, source, output, towers=tower, batch_size=batch_size, advance=advance, pool=pool
            )
    _report(written)


@use_app.command(epilog=terminal.example("nearfar predict runs/reviews new_reviews.csv -o predictions.csv"))
def predict(
    run: Run,
    data: Data,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="What to write: .csv, .tsv, .jsonl, .parquet, or a format of the system."
        ),
    ] = Path("predictions.csv"),
    column: ColumnOption = None,
    id_column: IdColumn = None,
    encoding: Encoding = None,
    images: Images = None,
    options: Options = None,
    device: Device = "auto",
    gallery: Annotated[
        Path | None,
        typer.Option(help="What rows are compared with, where they are compared; by default each other."),
    ] = None,
    gallery_column: Annotated[
        list[str] | None,
        typer.Option("--gallery-column", help="NAME=HEADER, as --column, of the gallery; may be repeated."),
    ] = None,
    k: Annotated[int | None, typer.Option("--k", "-k", help="How many nearest items are given.")] = None,
) -> None:
    """Predict with a trained run: aspects of reviews, classes, relations, boxes, expression, nearest items.

    Rows that cannot be read are counted and listed. A command that was killed goes on where it was.
    """
    from nearfar.serving import load
    from nearfar.serving.stream import predict_file

    source = new_data(data, column, id_column, encoding, images, options=options)
    others = None if gallery is None else new_data(gallery, gallery_column, id_column, encoding, images)
    trained = load(run, device)
    with terminal.progress_bar(None) as advance:
        written = predict_file(trained, source, output, gallery=others, k=k, advance=advance)
    _report(written)


@use_app.command(epilog=terminal.example("nearfar search runs/NAME 'an alkaloid with an indole core' -k 5"))
def search(
    run: Run,
    query: Annotated[
        str | None, typer.Argument(help="A text, the path of a picture, or a SMILES.", show_default=False)
    ] = None,
    gallery: Annotated[
        Path | None,
        typer.Option(help="A table or folder to search in; by default the data that the run was trained on."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where its vectors are kept: FOLDER.faiss, lance:FOLDER, qdrant:FOLDER, qdrant+http://HOST:PORT, "
            "postgresql://USER@HOST/DATABASE; by default a file beside the run."
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="A filter by columns: 'price<10', 'lang in de,en'; may be repeated."),
    ] = None,
    tower: Annotated[str | None, typer.Option(help="The view that the query is.")] = None,
    target: Annotated[str | None, typer.Option(help="The view of the gallery that is searched.")] = None,
    k: Annotated[int, typer.Option("-k", help="How many to show.")] = 10,
    queries: Annotated[
        Path | None, typer.Option(help="A file of queries: a text a line, or a table with their column.")
    ] = None,
    query_column: Annotated[str | None, typer.Option(help="The column of --queries that holds them.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write the hits as .csv, .tsv, .jsonl or .parquet."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write the hits to this page, with pictures and molecules.")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Compare with every row, also where there is an index.")
    ] = False,
    refill: Annotated[bool, typer.Option("--refill", help="Embed the gallery anew.")] = False,
    column: ColumnOption = None,
    id_column: IdColumn = None,
    encoding: Encoding = None,
    images: Images = None,
    options: Options = None,
    device: Device = "auto",
    molecule: Annotated[
        bool, typer.Option("--molecule", help="The same as --tower molecule.", hidden=True)
    ] = False,
    smiles_column: SmilesColumn = None,
    text_column: TextColumn = None,
) -> None:
    """Find what is nearest to a text, a picture or a molecule: in a table, a folder, a store, or the run's own data.

    A gallery is embedded once and kept; a command that was killed goes on where it was.
    """
    from nearfar.data.chunks import NewData
    from nearfar.serving.search_command import Asked, run_search

    source = None
    if gallery is not None:
        source = new_data(gallery, column, id_column, encoding, images, smiles_column, text_column, options)
    asked = Asked(
        query, None if queries is None else NewData(queries, encoding=encoding, images=images), query_column
    )
    run_search(
        run,
        asked,
        source,
        terminal.console(),
        place=store,
        where=where or (),
        tower="molecule" if molecule and tower is None else tower,
        target=target,
        k=k,
        output=output,
        page=html,
        exact=exact,
        refill=refill,
        device=device,
    )


@use_app.command(epilog=terminal.example("nearfar serve runs/NAME --port 8000"))
def serve(
    run: Run,
    gallery: Annotated[
        Path | None,
        typer.Option(help="What is searched: a table, a folder, …; by default the run's own data."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Instead: a store that nearfar search filled (FOLDER.faiss, lance:FOLDER, …)."),
    ] = None,
    no_gallery: Annotated[bool, typer.Option("--no-gallery", help="Embed and predict only.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option("--target", help="A view of the gallery to search; may be repeated. By default all."),
    ] = None,
    column: ColumnOption = None,
    id_column: IdColumn = None,
    encoding: Encoding = None,
    images: Images = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="A name under which the server may be asked; may be repeated. * is any."
        ),
    ] = None,
    wait: Annotated[
        float,
        typer.Option(min=0, max=1000, help="Milliseconds that a request waits for others to share a pass."),
    ] = 4.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Values that go through the model together.")] = 64,
    max_megabytes: Annotated[float, typer.Option(min=0.001, help="The size of a request.")] = 8.0,
    max_values: Annotated[int, typer.Option(min=1, help="Values of a request.")] = 256,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Time of a request.")] = 60.0,
    device: Device = "auto",
) -> None:
    """Serve a trained run: JSON (/embed /search /predict /health) and a page to ask it on.

    Only this machine reaches it unless --host says otherwise; there is no login.
    """
    from nearfar.errors import NearfarError
    from nearfar.serving import load
    from nearfar.serving.fill import file_source, open_gallery, own_source
    from nearfar.serving.gallery import Gallery, StoreGallery
    from nearfar.serving.limits import Limits, local_hosts
    from nearfar.serving.listen import serve as answer
    from nearfar.serving.server import build_app
    from nearfar.serving.stores import open_store

    console = terminal.console()

    def say(text: str) -> None:
        terminal.say(console, text, style="dim")

    if gallery is not None and store is not None:
        raise NearfarError("--gallery and --store are two things to search in: give one of them.")
    size = int(max_megabytes * 2**20)
    limits = Limits(body=size, memory=max(8 * size, 2**26), values=max_values, seconds=max_seconds)
    trained = load(run, device)
    searched: Gallery | None = None
    if store is not None:
        try:
            open_store(store).close()
        except NearfarError as error:
            fill = f"nearfar search {run} QUERY --gallery DATA --store {store}"
            raise NearfarError(f"{error} A search fills a store that is new: {fill}") from None
        searched = StoreGallery(trained, open_gallery(trained, None, None, place=store, say=say))
    elif gallery is not None:
        source = file_source(trained, new_data(gallery, column, id_column, encoding, images))
        searched = Gallery.open(trained, source, target, say)
    elif trained.views and not no_gallery:
        try:
            searched = Gallery.open(trained, own_source(trained), target, say)
        except NearfarError as error:
            if target:  # it was asked for
                raise
            terminal.say(console, f"nothing to search in, --gallery DATA gives it: {error}")
    app = build_app(
        trained,
        searched,
        limits=limits,
        hosts=local_hosts(host, allow_host or ()),
        wait=wait / 1000,
        batch=batch_size,
    )
    answer(
        app,
        host,
        port,
        lambda address: terminal.say(console, f"{trained.name}: {address} (stop with Ctrl-C)"),
    )


@use_app.command(epilog=terminal.example("nearfar export runs/NAME exported/ --format onnx"))
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(help="The folder to write: a new or an empty one.")],
    format_: Annotated[
        str, typer.Option("--format", help="safetensors, onnx, sentence-transformers or torch.")
    ] = "safetensors",
    tower: Annotated[
        list[str] | None,
        typer.Option("--tower", help="A view that is exported as a graph; may be repeated. By default all."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Values that graphs are checked with; by default the run's own data, if it is there."
        ),
    ] = None,
    license_: Annotated[
        str | None, typer.Option("--license", help="The model's license for its card, e.g. apache-2.0.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(help="OWNER/NAME: also upload the folder to the Hugging Face hub; needs a token."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: others cannot see it.")] = False,
) -> None:
    """Write a trained run for other tools, with a model card: safetensors, ONNX, sentence-transformers, torch.export.

    Every graph is compared with the model it is from, and the largest difference is printed.
    """
    from nearfar.serving.export import export_run
    from nearfar.serving.exported import check_push
    from nearfar.serving.exported import push as upload

    console = terminal.console()
    if push is not None:
        check_push(push)
    exported = export_run(
        run, folder, format_, tower=tower, data=data, license=license_,
        say=lambda text: terminal.say(console, text),
    )  # fmt: skip
    size = sum(path.stat().st_size for path in exported.folder.rglob("*") if path.is_file())
    terminal.say(
        console, f"{exported.folder}: {exported.format}, {size / 1e6:.1f} MB; README.md says how to load it"
    )
    if push is not None:
        terminal.say(console, f"uploaded: {upload(exported.folder, push, private)}")
