"""Graphs and fingerprints of molecules: against plain loops over RDKit, and at the edges of chemistry."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")

from nearfar.data.molecules.smiles import parse_smiles
from nearfar.errors import NearfarError
from nearfar.models.molecules.fingerprint import FINGERPRINT_KINDS, FingerprintSpec, compute_fingerprints
from nearfar.models.molecules.graph import ATOM_SIZES, BOND_SIZES, GraphTable, mask_atoms, mask_bonds

ODD = {
    "methane": "C",
    "helium": "[He]",
    "salt": "[Na+].[Cl-]",
    "dummy": "*CC*",
    "charged": "C[N+](C)(C)CC([O-])=O",
    "isotopes": "[2H]C([2H])([2H])[13CH3]",
    "stereo": "C/C=C\\C[C@H](N)C(=O)O",
    "aromatic": "c1ccc2[nH]ccc2c1",
    "radical": "C[CH2]",
    "metal": "[Fe+2].[C-]1C=CC=C1.[C-]1C=CC=C1",
    "heavy charge": "[Os+8]",
    "triple": "CC#N",
    "dative": "[NH3]->[Pt](Cl)Cl",
    "hydrogen": "[H][H]",
}


@pytest.fixture(scope="module")
def table():
    return GraphTable.from_smiles(list(ODD.values()), cache=False)


def slow_graph(smiles: str):
    """The features by their definition, one atom and one bond at a time."""
    molecule, _ = parse_smiles(smiles)
    chirality = ["CHI_UNSPECIFIED", "CHI_TETRAHEDRAL_CW", "CHI_TETRAHEDRAL_CCW", "CHI_OTHER"]
    hybrid = ["SP", "SP2", "SP3", "SP3D", "SP3D2"]
    stereo = ["STEREONONE", "STEREOZ", "STEREOE", "STEREOCIS", "STEREOTRANS", "STEREOANY"]
    kinds = ["SINGLE", "DOUBLE", "TRIPLE", "AROMATIC"]

    def place(values, value, size):
        return values.index(value) if value in values else size - 2

    atoms = []
    for a in molecule.GetAtoms():
        values = [
            (list(range(1, 119)), a.GetAtomicNum()),
            (chirality, str(a.GetChiralTag())),
            (list(range(11)), a.GetTotalDegree()),
            (list(range(-5, 6)), a.GetFormalCharge()),
            (list(range(9)), a.GetTotalNumHs()),
            (list(range(5)), a.GetNumRadicalElectrons()),
            (hybrid, str(a.GetHybridization())),
            ([False, True], a.GetIsAromatic()),
            ([False, True], a.IsInRing()),
        ]
        atoms.append([place(v, x, size) for (v, x), size in zip(values, ATOM_SIZES, strict=True)])
    edges, bonds = [], []
    for b in molecule.GetBonds():
        values = [(kinds, str(b.GetBondType())), (stereo, str(b.GetStereo()))]
        values.append(([False, True], b.GetIsConjugated()))
        row = [place(v, x, size) for (v, x), size in zip(values, BOND_SIZES, strict=True)]
        i, j = b.GetBeginAtomIdx(), b.GetEndAtomIdx()
        edges += [[i, j], [j, i]]
        bonds += [row, row]
    return atoms, edges, bonds


@pytest.mark.parametrize("name", ODD)
def test_one_graph_against_the_plain_loop(table, name):
    position = list(ODD).index(name)
    atoms, edges, bonds = slow_graph(ODD[name])
    graph = table.batch([position])
    assert graph.x.tolist() == atoms
    assert graph.edge_index.T.tolist() == edges
    assert graph.edge_attr.tolist() == bonds
    assert graph.edge_index.shape[0] == 2
    assert graph.edge_attr.shape[1] == 3


def test_sizes_and_reserved_indices(table):
    assert ATOM_SIZES == (120, 6, 13, 13, 11, 7, 7, 4, 4)
    assert BOND_SIZES == (6, 8, 4)
    everything = table.batch(range(len(table)))
    assert (everything.x < torch.tensor(ATOM_SIZES) - 1).all()  # the masked index never comes from chemistry
    assert (everything.edge_attr < torch.tensor(BOND_SIZES) - 1).all()
    dummy = table.batch([list(ODD).index("dummy")])
    assert dummy.x[0, 0] == ATOM_SIZES[0] - 2
    assert table.batch([list(ODD).index("heavy charge")]).x[0, 3] == ATOM_SIZES[3] - 2
    assert table.batch([list(ODD).index("dative")]).edge_attr[0, 0] == BOND_SIZES[0] - 2


def test_batch_equals_torch_geometric(table):
    geometric = pytest.importorskip("torch_geometric.data")
    positions = [3, 0, 6, 6, 2, 13, 9, 1]
    batch = table.batch(positions)
    expected = geometric.Batch.from_data_list([table.to_data(i) for i in positions])
    for name in ("x", "edge_index", "edge_attr", "batch"):
        torch.testing.assert_close(getattr(batch, name), getattr(expected, name))
        assert getattr(batch, name).dtype == torch.int64
    assert batch.num_graphs == expected.num_graphs == 8


def test_batch_of_bondless_molecules_and_of_nothing(table):
    lonely = table.batch([0, 1, 2])
    assert lonely.edge_index.shape == (2, 0)
    assert lonely.edge_attr.shape == (0, 3)
    assert lonely.batch.tolist() == [0, 1, 2, 2]
    nothing = table.batch([])
    assert nothing.x.shape == (0, 9)
    assert nothing.num_graphs == 0
    with pytest.raises(IndexError):
        table.batch([len(table)])
    with pytest.raises(IndexError):
        table.batch([-1])


def test_unparsable_smiles_is_an_error():
    with pytest.raises(NearfarError, match=r"Molecule 1 \('C1CC'\).*unclosed ring"):
        GraphTable.from_smiles(["C", "C1CC"], cache=False)


@pytest.mark.parametrize(
    ("smiles", "words"),
    [
        ("", "empty SMILES"),
        ("   ", "empty SMILES"),
        ("C(C", "unbalanced parentheses"),
        ("C[N", "unbalanced brackets"),
        ("C1CC", "unclosed ring"),
        ("F(C)C", "greater than permitted"),
        ("c1cccc1", "kekulize"),
        ("hello", "SMILES syntax error"),
    ],
)
def test_reason_why_a_smiles_is_no_molecule(smiles, words, capfd):
    molecule, reason = parse_smiles(smiles)
    assert molecule is None
    assert words in reason
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_masking_hides_whole_atoms_at_the_asked_rate():
    table = GraphTable.from_smiles(["c1ccccc1CCO"] * 2000, cache=False)
    graph = table.batch(range(2000))
    kept = graph.x.clone(), graph.edge_attr.clone()
    masked = mask_atoms(graph, 0.15, torch.Generator().manual_seed(1))
    hidden = (masked.x == torch.tensor(ATOM_SIZES) - 1).all(1)
    assert abs(hidden.double().mean() - 0.15) < 0.01  # 18,000 atoms: four standard errors are 0.011
    torch.testing.assert_close(masked.x[~hidden], graph.x[~hidden])
    assert masked.edge_attr is graph.edge_attr
    bonds = mask_bonds(graph, 0.25, torch.Generator().manual_seed(1))
    gone = (bonds.edge_attr == torch.tensor(BOND_SIZES) - 1).all(1)
    assert abs(gone.double().mean() - 0.25) < 0.015
    assert torch.equal(gone[0::2], gone[1::2])
    assert torch.equal(graph.edge_index[:, 0::2], graph.edge_index[:, 1::2].flip(0))
    torch.testing.assert_close((graph.x, graph.edge_attr), kept)  # the input is left as it was
    again = mask_atoms(graph, 0.15, torch.Generator().manual_seed(1))
    assert torch.equal(masked.x, again.x)


def test_graphs_come_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NEARFAR_CACHE", str(tmp_path))
    first = GraphTable.from_smiles(list(ODD.values()))
    monkeypatch.setattr("nearfar.models.molecules.graph._featurise_all", lambda _: pytest.fail("again"))
    second = GraphTable.from_smiles(list(ODD.values()))
    np.testing.assert_array_equal(first.atoms, second.atoms)
    np.testing.assert_array_equal(first.edge_ptr, second.edge_ptr)


@pytest.mark.slow
def test_morgan_counts_against_rdkit():
    from rdkit import Chem
    from rdkit.Chem import AllChem

    smiles = ["CC(=O)Oc1ccccc1C(=O)O", "C" * 300, "[Na+].[Cl-]"]
    counts = compute_fingerprints(smiles, FingerprintSpec(radius=3, n_bits=512), cache=False)
    bits = compute_fingerprints(smiles, FingerprintSpec(radius=3, n_bits=512, counts=False), cache=False)
    generator = AllChem.GetMorganGenerator(radius=3, fpSize=512)
    for row, text in enumerate(smiles):
        expected = np.zeros(512, dtype=np.int64)
        nonzero = generator.GetCountFingerprint(Chem.MolFromSmiles(text)).GetNonzeroElements()
        for bit, count in nonzero.items():
            expected[bit] = min(count, 255)
        np.testing.assert_array_equal(counts[row], expected)
        np.testing.assert_array_equal(bits[row], expected > 0)
    assert counts.dtype == bits.dtype == np.uint8
    assert counts.max() == 255  # the long chain has more than 255 equal atoms, and nothing wraps around


@pytest.mark.parametrize("kind", FINGERPRINT_KINDS)
def test_every_kind_is_finite_and_tells_molecules_apart(kind):
    spec = FingerprintSpec(("morgan", kind) if kind != "morgan" else ("morgan",), n_bits=256)
    out = compute_fingerprints(
        ["CC(=O)Oc1ccccc1C(=O)O", "CCN(CC)CCNC(=O)c1ccccc1", "[Na+].[Cl-]"], spec, False
    )
    assert out.shape == (3, spec.dim)
    assert out.dtype == (np.float32 if kind == "descriptors" else np.uint8)
    part = out[:, 256:] if kind != "morgan" else out
    assert np.isfinite(part).all()
    assert np.abs(part.astype(float)).max() < 256
    assert (part[0] != part[1]).any()


def test_chirality_is_a_choice():
    pair = ["C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"]
    flat = compute_fingerprints(pair, FingerprintSpec(), cache=False)
    chiral = compute_fingerprints(pair, FingerprintSpec(chirality=True), cache=False)
    assert (flat[0] == flat[1]).all()
    assert (chiral[0] != chiral[1]).any()


def test_fingerprint_errors():
    with pytest.raises(NearfarError, match="did you mean 'morgan'"):
        FingerprintSpec(("morgen",))
    with pytest.raises(NearfarError, match="names a kind twice"):
        FingerprintSpec(("maccs", "maccs"))
    with pytest.raises(NearfarError, match="n_bits at least 8"):
        FingerprintSpec(n_bits=0)
    with pytest.raises(NearfarError, match="has no fingerprint"):
        compute_fingerprints(["C1CC"], cache=False)
    assert FingerprintSpec("maccs").kinds == ("maccs",)
