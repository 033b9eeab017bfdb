"""Every system that embeds is searched in its own data, which is recognised as that of the run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

import nearfar
from nearfar.config.compose import compose_config
from nearfar.launch import run_one
from nearfar.serving.search import hits_page
from nearfar.systems import build_system, check_config

QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
pytestmark = [pytest.mark.usefixtures("module_cache"), pytest.mark.slow]
COMMON = [
    "epochs=1",
    "bootstrap=0",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "report=false",
    "trainer.probe_rows=0",
]

#: options of a tiny run, the view that is searched, and what a page of hits holds
SYSTEMS: dict[str, tuple[list[str], str, str]] = {
    "labels": (
        ["experiment=labels", "data.limit=60", "batch_size=20", "embedding_dim=8", "image_encoder=colors"],
        "image",
        "data:image/png",
    ),
    "augmented": (
        ["experiment=augmented", "data.limit=60", "batch_size=20", "embedding_dim=8", "image_encoder=colors"],
        "image",
        "data:image/png",
    ),
    "aspects": (["experiment=aspects", "data=aspects_embedded", "data.embedded_size=120"], "text", ""),
    "tissue": (
        [
            *(
                "experiment=medium_spatial",
                "data.slides=4",
                "data.side=8",
                "data.generated_genes=40",
                "batch_size=32",
            ),
            *("image_encoder=colors", "hidden=16", "embedding_dim=8", "retrieve=10", "variable_genes=20"),
            "expressed_genes=5",
        ],
        "gene",
        "",
    ),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_own_data_of_every_system(system: str, tmp_path: Path) -> None:
    more, target, shown = SYSTEMS[system]
    overrides = [*more, *COMMON, f"runs_dir={tmp_path}", "name=run"]
    folder = run_one(check_config(compose_config(overrides)), overrides, False, QUIET)
    assert folder is not None
    trained = nearfar.load(folder.path, device="cpu")
    splits, _ = build_system(trained.config).own_data(lambda _: None)
    n = sum(len(items) for items in splits.values())
    items = splits["train"]
    view = trained.views[0]
    hits = trained.search(items[view][0], k=3, tower=view, target=target)
    assert (len(hits), hits.view, hits.target) == (3, view, target)
    if view == target:  # it finds itself
        assert hits[0].score == pytest.approx(1, abs=1e-4)
        assert items.ids[0] in [hit.id.removeprefix("train/") for hit in hits]
    assert shown in hits_page([hits])
    everything = trained.search(items[view][0], k=n, tower=view, target=target)
    assert len(everything) == n
    assert {hit["split"] for hit in everything} == set(splits)
    assert len({hit.id for hit in everything}) == n
