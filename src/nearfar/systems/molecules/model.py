"""The two towers: molecule encoder (fingerprints, graph, or both) and text head, and a memory of earlier pairs."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nearfar.contrast import DuplicateMask, Mask, SimilarityMask, join_masks
from nearfar.errors import NearfarError, nearest_name
from nearfar.losses.memory import CrossBatchMemory
from nearfar.models import ProjectionHead
from nearfar.models.molecules.networks import FingerprintEncoder, GraphTransformer
from nearfar.systems.molecules.dataset import MoleculeBatch
from nearfar.systems.molecules.options import MoleculeOptions

__all__ = [
    "MOLECULE_ENCODERS",
    "TEXT_HEADS",
    "MoleculeTextModel",
    "PairMemory",
]


class PairMemory(nn.Module):
    """The last ``size`` pairs: both embeddings (``dim``), and the frozen text vectors (``text_dim``) they came from.

    The frozen vectors are kept (``text_dim`` not None) where texts too similar to a query's are left out.
    """

    def __init__(self, size: int, dim: int, text_dim: int | None = None) -> None:
        super().__init__()
        self.molecules = CrossBatchMemory(size, dim, ids=True)
        self.texts = CrossBatchMemory(size, dim, ids=True)
        self.vectors = None if text_dim is None else CrossBatchMemory(size, text_dim)

    @property
    def filled(self) -> int:
        """The number of pairs stored so far."""
        return self.molecules.filled

    def push(
        self, molecules: Float[Tensor, "b d"], texts: Float[Tensor, "b d"], batch: MoleculeBatch
    ) -> None:
        """Keep the pairs of a batch after its step."""
        self.molecules.push(molecules, batch.structure_group)
        self.texts.push(texts, batch.text_group)
        if self.vectors is not None:
            self.vectors.push(batch.text)

    def left_out(self, batch: MoleculeBatch, duplicates: bool, threshold: float | None) -> Mask:
        """Pairs (row of the batch, pair of the memory) that are no negatives, in either direction.

        Always the row itself, from an earlier epoch; with ``duplicates`` all that share its structure or its text;
        with ``threshold`` all whose frozen text vectors have this cosine or more.
        """
        structures = (batch.structure_group, self.molecules.ids())
        texts = (batch.text_group, self.texts.ids())
        masks: list[Mask] = [DuplicateMask(*structures), DuplicateMask(*texts)]
        if not duplicates:
            own, kept = ((structure << 32) + text for structure, text in zip(structures, texts, strict=True))
            masks = [DuplicateMask(own, kept)]
        if threshold is not None:
            assert self.vectors is not None
            masks.append(_SimilarBeyond(batch.text, self.vectors.rows(), threshold))
        joined = join_masks(masks)
        assert joined is not None
        return joined

    def age(self) -> Float[Tensor, ""]:
        """Mean age of the pairs in steps; 0 where there is none."""
        return self.molecules.age().float().mean() if self.filled else torch.zeros(())


class _SimilarBeyond:
    """A ``SimilarityMask`` between the rows of a batch and others."""

    symmetric = False

    def __init__(self, own: Float[Tensor, "n d"], others: Float[Tensor, "m d"], threshold: float) -> None:
        self.shape = (len(own), len(others))
        self._all = SimilarityMask(torch.cat([own, others]), threshold)

    def tile(self, rows: slice, columns: slice) -> Bool[Tensor, "r c"]:
        return self._all.tile(rows, slice(columns.start + self.shape[0], columns.stop + self.shape[0]))


MOLECULE_ENCODERS = ("graph", "fingerprint", "both")
TEXT_HEADS = ("none", "linear", "mlp")
_MAX_SCALE = 100.0


class MoleculeTextModel(nn.Module):
    """Two towers: ``encode_molecules`` and ``encode_texts`` give (B, d) vectors, not normalised.

    Args:
        text_dim: length of the frozen text vectors.
        fingerprint_dim: length of the fingerprints, where the encoder reads them.
        molecule_encoder: "graph", "fingerprint", or "both" (two encoders whose vectors add up).
        text_head: what is trained above the frozen text vectors: nothing, a linear map, or a two-layer
            network. Without one the molecules must come to the texts, and d is ``text_dim``.
        embedding_dim: d, with a text head.
        hidden, layers, heads, dropout: of the graph transformer.
        fingerprint_hidden, fingerprint_layers, fingerprint_dropout, input_dropout: of the fingerprint
            network, see `FingerprintEncoder`.
        text_dropout: of the text head's hidden layer ("mlp").
        temperature: of the loss; with ``learn_temperature`` where learning starts.
        memory: so many pairs of earlier batches are kept as further negatives (`PairMemory`), with
            ``memory_of_vectors`` also the frozen text vectors of theirs. Weights of a model with a different memory
            can be loaded: this one is then empty.

    ``scale()`` is the learned 1 / temperature, at most ``max_scale`` = 100 as in CLIP, or ``None`` (both) where it
    does not learn and the loss's own temperature holds.

    >>> model = MoleculeTextModel(text_dim=24, fingerprint_dim=64, embedding_dim=16)
    >>> model.encode_texts(torch.zeros(3, 24)).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        text_dim: int,
        fingerprint_dim: int | None = None,
        *,
        molecule_encoder: str = "fingerprint",
        text_head: str = "linear",
        embedding_dim: int = 512,
        hidden: int = 128,
        layers: int = 4,
        heads: int = 4,
        dropout: float = 0.1,
        fingerprint_hidden: int = 1024,
        fingerprint_layers: int = 2,
        fingerprint_dropout: float = 0.4,
        input_dropout: float = 0.2,
        text_dropout: float = 0.1,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        memory: int = 0,
        memory_of_vectors: bool = False,
    ) -> None:
        super().__init__()
        _check_choice("molecule_encoder", molecule_encoder, MOLECULE_ENCODERS)
        _check_choice("text_head", text_head, TEXT_HEADS)
        if learn_temperature and temperature < 1 / _MAX_SCALE:
            raise NearfarError(
                f"temperature={temperature} is below {1 / _MAX_SCALE}, the least learned temperature; "
                "start higher, or set learn_temperature=false."
            )
        self.molecule_encoder = molecule_encoder
        self.dim = text_dim if text_head == "none" else embedding_dim
        self.graph: GraphTransformer | None = None
        self.fingerprint: FingerprintEncoder | None = None
        if molecule_encoder in ("graph", "both"):
            self.graph = GraphTransformer(hidden, layers, heads, self.dim, dropout)
        if molecule_encoder in ("fingerprint", "both"):
            if fingerprint_dim is None:
                raise NearfarError(
                    f"molecule_encoder={molecule_encoder} reads fingerprints, and fingerprint_dim, their "
                    "length, was not given."
                )
            self.fingerprint = FingerprintEncoder(
                fingerprint_dim,
                fingerprint_hidden,
                self.dim,
                fingerprint_layers,
                fingerprint_dropout,
                input_dropout,
            )
        self.text = _text_head(text_head, text_dim, self.dim, text_dropout)
        self.max_scale = _MAX_SCALE if learn_temperature else None
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)), requires_grad=learn_temperature)
        self.memory = (
            PairMemory(memory, self.dim, text_dim if memory_of_vectors else None) if memory else None
        )
        self.register_load_state_dict_pre_hook(_own_memory)

    @classmethod
    def from_config(
        cls, config: MoleculeOptions, text_dim: int, fingerprint_dim: int | None
    ) -> MoleculeTextModel:
        """From the options of the system, by their names."""
        return cls(
            text_dim,
            fingerprint_dim,
            molecule_encoder=config.molecule_encoder,
            text_head=config.text_head,
            embedding_dim=config.embedding_dim,
            hidden=config.hidden,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
            fingerprint_hidden=config.fingerprint_hidden,
            fingerprint_dropout=config.fingerprint_dropout,
            input_dropout=config.input_dropout,
            temperature=config.temperature,
            learn_temperature=config.learn_temperature,
            memory=config.memory,
            memory_of_vectors=config.false_negative_threshold is not None,
        )

    def encode_molecules(self, batch: MoleculeBatch) -> Float[Tensor, "b d"]:
        """The molecules of a batch, from its graphs, its fingerprints or both."""
        parts = []
        if self.graph is not None:
            if batch.graph is None:
                raise self._missing("graphs")
            parts.append(self.graph(batch.graph))
        if self.fingerprint is not None:
            if batch.fingerprint is None:
                raise self._missing("fingerprints")
            parts.append(self.fingerprint(batch.fingerprint))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def encode_texts(self, embeddings: Float[Tensor, "b text"]) -> Float[Tensor, "b d"]:
        """Frozen text vectors through the trained head."""
        return self.text(embeddings)

    def scale(self) -> Float[Tensor, ""] | None:
        """1 / temperature where it is learned, else None."""
        if self.max_scale is None:
            return None
        return self.log_scale.exp().clamp(max=self.max_scale)

    def _missing(self, what: str) -> NearfarError:
        return NearfarError(f"molecule_encoder={self.molecule_encoder} reads {what}, and the batch has none.")


def _own_memory(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """When weights are loaded: a memory of a different size, or none, is replaced by the model's own empty one."""
    mine = {f"{prefix}{key}": value for key, value in model.state_dict().items() if key.startswith("memory.")}
    theirs = {key: value for key, value in state.items() if key.startswith(f"{prefix}memory.")}
    if {key: value.shape for key, value in mine.items()} != {
        key: value.shape for key, value in theirs.items()
    }:
        for key in theirs:
            del state[key]
        state.update(mine)


def _text_head(kind: str, text_dim: int, dim: int, dropout: float) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(text_dim, dim)
    return ProjectionHead(text_dim, dim, dim, dropout=dropout, norm="layer", activation="gelu")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise NearfarError(f"{option}={value}: no such choice; {nearest_name(value, choices)}")
