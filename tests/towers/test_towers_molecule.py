"""The tower of molecules: what it checks, reads, builds and calls similar."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")
pytest.importorskip("torch_geometric")

from nearfar.data.batch import Batch, Draw, ItemDataset
from nearfar.errors import NearfarError
from nearfar.models.molecules.fingerprint import FingerprintSpec, compute_fingerprints
from nearfar.models.molecules.networks import FingerprintEncoder, GraphTransformer
from nearfar.towers import build_tower, load_tower
from nearfar.towers.molecule import MoleculeTower

pytestmark = pytest.mark.usefixtures("module_cache")
SMILES = ["CCO", "c1ccccc1C(=O)O", "[Na+].[Cl-]", "InChI=1S/C2H6O/c1-2-3/h3H,2H2,1H3"]
SMALL = {"width": 8, "hidden": 16, "layers": 2, "heads": 2, "fingerprint_hidden": 16, "bits": 64}


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


@pytest.mark.parametrize("encoder", ["fingerprint", "graph", "both"])
def test_from_smiles_to_vectors_and_back_from_disk(tmp_path, encoder):
    tower = build_tower("molecule", "m", encoder=encoder, **SMALL)
    module = seeded(tower.fit(SMILES).build).eval()
    vectors = module(tower.read(SMILES).batch(torch.arange(4)))
    assert vectors.shape == (4, module.width) == (4, 8)
    torch.testing.assert_close(vectors[0], vectors[3])  # the InChI of the first
    tower.save(tmp_path / "m")
    again = load_tower(tmp_path / "m")
    assert again.options == tower.options
    assert again.description == tower.description
    other = again.build().eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(again.read(SMILES).batch(torch.arange(4))), vectors)


def test_the_networks_are_those_of_the_options_graph_first():
    options = {**SMALL, "dropout": 0.3, "fingerprints": ["maccs", "morgan"], "radius": 1}
    options |= {"fingerprint_layers": 3, "fingerprint_dropout": 0.1, "input_dropout": 0.5}
    tower = MoleculeTower("both", **options)

    def by_hand():
        return GraphTransformer(16, 2, 2, 8, 0.3), FingerprintEncoder(167 + 64, 16, 8, 3, 0.1, 0.5)

    module, expected = seeded(tower.build), seeded(by_hand)
    for own, other in zip((module.graph, module.fingerprint), expected, strict=True):
        assert str(own) == str(other)
        for name, value in other.state_dict().items():
            assert torch.equal(own.state_dict()[name], value)
    assert (
        tower.description
        == "graph (9 atom and 3 bond features) and fingerprint (maccs + morgan, 231 numbers)"
    )


def test_values_that_are_no_molecules():
    tower = MoleculeTower()
    assert tower.check(["CCO", "C1CC", "", "  ", "F(C)C", "CCO>>CC=O"]) == [
        None,
        "unparsable SMILES",
        "empty SMILES",
        "empty SMILES",
        "unparsable SMILES",
        "unparsable SMILES",
    ]
    assert tower.check([]) == []
    with pytest.raises(NearfarError, match=r"Molecule 1 \('C1CC'\) has no fingerprint"):
        tower.read(["CCO", "C1CC"])


@pytest.mark.parametrize("kinds", ["morgan", ["morgan", "descriptors"]])
def test_similar_molecules_have_similar_fingerprints(kinds):
    tower = MoleculeTower("graph", fingerprints=kinds, bits=256)
    reference = tower.reference(["CCCCO", "CCCCCO", "c1ccncc1"])
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    spec = FingerprintSpec(kinds, n_bits=256, chirality=True)
    for row, smiles in zip(reference, ["CCCCO", "CCCCCO", "c1ccncc1"], strict=True):
        counts = compute_fingerprints([smiles], spec, cache=False)[0].astype(np.float64)
        np.testing.assert_allclose(row, [np.sign(x) * np.log1p(abs(x)) for x in counts], rtol=1e-6)
    assert reference.dtype == np.float32
    unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2]


def test_atoms_and_bonds_are_masked_where_asked():
    tower = MoleculeTower("both", mask_atoms=0.5, **SMALL)
    assert MoleculeTower("both", **SMALL).augment("m") is None
    inputs = tower.read(["C" * 200])
    whole = inputs.batch(torch.tensor([0]))
    dataset = ItemDataset({"m": inputs}, tower.augment("m"), seed=1)
    masked = dataset.__getitems__([0])["m"]
    again = tower.augment("m")(Batch(torch.tensor([0]), {"m": whole}), Draw(1, 0, 0))["m"]
    assert torch.equal(masked.graph.x, again.graph.x)
    changed = (masked.graph.x != whole.graph.x).any(1).double().mean()
    assert 0.3 < changed < 0.7
    assert torch.equal(masked.graph.edge_attr, whole.graph.edge_attr)
    assert torch.equal(masked.fingerprint, whole.fingerprint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "grap"}, "did you mean 'graph'"),
        ({"encoder": "graph", "hidden": 30}, "multiple of heads=4"),
        ({"mask_bonds": 0.1}, "encoder=graph or both"),
        ({"encoder": "graph", "mask_atoms": 1}, "mask_atoms=1: a number from 0 to below 1"),
        ({"fingerprints": ["morgen"]}, "did you mean 'morgan'"),
        ({"fingerprints": []}, "is empty"),
        ({"bits": 4}, "bits=4: a whole number of at least 8"),
        ({"width": 2.5}, "width=2.5: a whole number"),
        ({"layers": True}, "layers=True"),
        ({"input_dropout": float("nan")}, "input_dropout=nan"),
        ({"chirality": "yes"}, "chirality=yes: true or false"),
        ({"widht": 3}, "did you mean 'width'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(NearfarError, match=message):
        build_tower("molecule", "views.drug", **options)


def test_without_its_packages(monkeypatch):
    monkeypatch.setattr("nearfar.towers.molecule.find_spec", lambda _: None)
    for use in (lambda: MoleculeTower().check(["C"]), lambda: MoleculeTower("graph").build()):
        with pytest.raises(NearfarError, match=r"pip install 'nearfar\[molecules\]'"):
            use()
    assert importlib.util.find_spec("rdkit")
