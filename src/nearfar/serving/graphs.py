"""Towers as graphs of tensors: ONNX files and programs of torch.export, each checked against the model it is from."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.functional import normalize

from nearfar.data.batch import Field
from nearfar.data.cache import without_cache
from nearfar.data.items import Column
from nearfar.errors import NearfarError
from nearfar.models.hub import merge_adapters
from nearfar.models.views import ViewModel
from nearfar.serving.trained import Trained
from nearfar.towers.base import BATCH, TowerGraph

__all__ = ["OUTPUT", "TOLERANCE", "Parity", "ViewGraph", "view_graph", "write_onnx", "write_program"]

#: the name of the vectors that a graph gives
OUTPUT = "vectors"
#: the largest difference of a number of a unit vector from what the model gives
TOLERANCE = 1e-5
RECIPE = "preprocessing.json"
#: sizes of the batches on which a written graph is compared with the model
_SIZES = (1, 2, 5, 16)


@dataclass(frozen=True)
class Parity:
    """How far a written graph is from the model: for each batch size the largest difference of any number."""

    view: str
    differences: Mapping[int, float]
    real: bool

    @property
    def largest(self) -> float:
        return max(self.differences.values())

    def __str__(self) -> str:
        sizes = ", ".join(f"{size}: {value:.1e}" for size, value in self.differences.items())
        which = "values of the data" if self.real else "made-up values (the data of the run is not at hand)"
        return f"{self.view}: largest difference from the model by batch size, on {which}: {sizes}"


class Embedder(nn.Module):
    """A view's tensors to its unit vectors: what the tower reads, its trained module, its head, normalisation."""

    def __init__(
        self, embed: Callable[[nn.Module, Field], Tensor], model: nn.Module, graph: TowerGraph
    ) -> None:
        super().__init__()
        self.field, self.model, self._embed = graph.field, model, embed

    def forward(self, *tensors: Tensor) -> Tensor:
        return normalize(self._embed(self.model, self.field(*tensors)).float(), dim=1)


@dataclass(frozen=True)
class ViewGraph:
    """The program of a view, its inputs, and the values and vectors that it is checked with."""

    view: str
    program: ExportedProgram
    graph: TowerGraph
    values: Column
    vectors: np.ndarray
    real: bool

    def check(self, run: Callable[[dict[str, np.ndarray]], np.ndarray]) -> Parity:
        """Compare what ``run`` gives of tensors by name with the model's vectors, in batches of several sizes.

        ``NearfarError`` where any number differs by more than `TOLERANCE`.
        """
        differences: dict[int, float] = {}
        for size in [size for size in _SIZES if size <= len(self.values)]:
            tensors = self.graph.tensors(self.values[:size])
            differences[size] = float(np.abs(run(tensors) - self.vectors[:size]).max())
        parity = Parity(self.view, differences, self.real)
        if not parity.largest <= TOLERANCE:  # NaN counts as different
            raise NearfarError(
                f"the exported graph of '{self.view}' differs from the model by {parity.largest:.1e}, more than "
                f"{TOLERANCE:g}: it is not kept. Take --format safetensors, and tell us (the run's config.yaml)."
            )
        return parity

    def save(self, folder: Path) -> None:
        """Write how inputs are made, and what that needs."""
        if self.graph.save is not None:
            self.graph.save(folder)
        output = {"name": OUTPUT, "dtype": "float32", "shape": [BATCH, int(self.vectors.shape[1])]}
        recipe = {"view": self.view, **self.graph.describe(), "output": {**output, "about": "unit vectors"}}
        text = json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
        (folder / RECIPE).write_text(text, encoding="utf-8")


def view_graph(trained: Trained, view: str, values: Column | None = None) -> ViewGraph:
    """The program of a view by torch.export, with a free batch size (of texts also a free number of tokens).

    ``values`` are real ones of the view, with which it is traced and checked; without any, made-up ones are.

    ``NearfarError`` says why a tower has no graph.
    """
    system, model = trained.system, trained.model
    try:
        graph = system.towers[view].graph()
    except NearfarError as error:
        raise NearfarError(
            f"'{view}' cannot be exported as a graph: {error}, or take --format safetensors."
        ) from None
    real = values is not None and len(values) > 1
    shown = values if real and values is not None else made_up_values(graph, system.towers[view].kind)
    shown = shown[: max(_SIZES)]
    with without_cache():
        tensors = graph.tensors(shown)
    part = merge_adapters(model.only(view) if isinstance(model, ViewModel) else model).cpu().eval()

    def embed(module: nn.Module, field: Field) -> Tensor:
        return system.embed_view(module, view, field)

    embedder = Embedder(embed, part, graph).eval()
    axes = {BATCH: Dim(BATCH)}
    for name, (least, most) in graph.lengths.items():
        axes[name] = Dim(name, min=least, max=most)
    shapes = tuple(
        {at: axes[axis] for at, axis in enumerate(each.shape) if isinstance(axis, str)}
        for each in graph.inputs
    )
    arguments = tuple(torch.from_numpy(tensors[each.name]) for each in graph.inputs)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(embedder, arguments, dynamic_shapes=(shapes,))
        except Exception as error:  # tracing raises whatever the code of a network leads to
            raise _untraceable(view, error) from error
    for node in program.graph.nodes:  # where in the source of this machine each operation comes from
        node.meta.pop("stack_trace", None)
    return ViewGraph(view, program, graph, shown, trained.embed(shown, view), real)


def made_up_values(graph: TowerGraph, kind: str) -> Column:
    """Values of a view for tracing and checking a graph where there are no real ones: texts, molecules, pixels of
    noise, random numbers."""
    count, rng = max(_SIZES), np.random.default_rng(0)
    if graph.inputs[0].dtype == "int64":
        words = ["a", "small", "grey", "cat", "on", "the", "roof", "of", "our", "old", "house", "today"]
        return [" ".join(words[: 1 + i % len(words)]) for i in range(count)]
    if kind == "molecule":
        return ["C" * (1 + i) + ("O", "N", "c1ccccc1", "C(=O)O")[i % 4] for i in range(count)]
    shape = [int(side) for side in graph.inputs[0].shape[1:]]
    if graph.inputs[0].dtype == "uint8":
        return rng.integers(0, 256, (count, shape[1], shape[2], 3), dtype=np.uint8)
    return rng.normal(size=(count, *shape)).astype(np.float32)


# -- torch.export --------------------------------------------------------------------------------------------
def write_program(view: ViewGraph, folder: Path) -> Parity:
    """Write ``model.pt2``, which ``torch.export.load`` reads; loaded again it is compared with the model.

    The file holds tensors and a description of the graph as JSON, and no pickled object.
    """
    path = folder / "model.pt2"
    folder.mkdir(parents=True, exist_ok=True)
    view.program.example_inputs = None  # they would be pickled
    with _quiet():
        torch.export.save(view.program, path)
        program = torch.export.load(path).module()

    def run(tensors: dict[str, np.ndarray]) -> np.ndarray:
        with torch.no_grad():
            given = [torch.from_numpy(tensors[each.name]) for each in view.graph.inputs]
            vectors: Tensor = program(*given)
        return vectors.numpy()

    parity = view.check(run)
    view.save(folder)
    return parity


# -- ONNX ----------------------------------------------------------------------------------------------------
def write_onnx(view: ViewGraph, folder: Path) -> Parity:
    """Write ``model.onnx``; onnxruntime, on the CPU, is compared with the model."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise NearfarError(
            f"--format onnx needs onnx, onnxscript and onnxruntime ({error}): pip install 'nearfar[export]'."
        ) from None
    path = folder / "model.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    names = [each.name for each in view.graph.inputs]
    with _quiet():
        try:
            written = torch.onnx.export(
                view.program, dynamo=True, input_names=names, output_names=[OUTPUT], verbose=False
            )
            assert written is not None
            written.save(str(path))
        except Exception as error:  # an operation that ONNX does not have, above all
            raise _untraceable(view.view, error) from error
    _tidy(onnx, path, view.graph)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _untraceable(view.view, error) from error

    def run(tensors: dict[str, np.ndarray]) -> np.ndarray:
        vectors: np.ndarray = session.run([OUTPUT], {name: tensors[name] for name in names})[0]
        return vectors

    parity = view.check(run)
    view.save(folder)
    return parity


def _tidy(onnx: ModuleType, path: Path, graph: TowerGraph) -> None:
    """Give the free axes of inputs and output the names that the tower has for them, and remove what the exporter notes
    of its own source at every node."""
    content = onnx.load(str(path), load_external_data=False)
    renamed: dict[str, str] = {}
    for given, wanted in zip(content.graph.input, graph.inputs, strict=True):
        for axis, name in zip(given.type.tensor_type.shape.dim, wanted.shape, strict=True):
            if axis.dim_param and isinstance(name, str):
                renamed[axis.dim_param] = name
    for value in [*content.graph.input, *content.graph.output, *content.graph.value_info]:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in renamed:
                axis.dim_param = renamed[axis.dim_param]
    for each in [*content.graph.node, *content.graph.value_info, *content.graph.input, *content.graph.output]:
        del each.metadata_props[:]
    for function in content.functions:
        for node in function.node:
            del node.metadata_props[:]
    onnx.save(content, str(path))


def _untraceable(view: str, error: Exception) -> NearfarError:
    cause = " ".join(str(error).split())[:300] or type(error).__name__
    return NearfarError(
        f"'{view}' cannot be made into a graph ({cause}). Take --format safetensors, or export a different view with "
        "--tower."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on libraries that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
