"""What a report shows beside estimates."""

from __future__ import annotations

import torch

from nearfar.training.sections import retrieval_examples


def test_examples_count_ties_by_expectation() -> None:
    def examples(queries: torch.Tensor, keys: torch.Tensor) -> list[dict[str, object]]:
        return retrieval_examples(queries, keys, lambda i: {"text": f"q{i}"}, lambda i: {"text": f"k{i}"})

    same = examples(torch.ones(5, 3), torch.ones(5, 3))
    assert {example["rank"] for example in same} == {3}  # the mean of 1 … 5
    assert {example["kind"] for example in same} == {"nearly"}
    distinct = examples(torch.eye(5), torch.eye(5))
    assert {(example["rank"], example["kind"]) for example in distinct} == {(1, "right")}
    pair = torch.eye(5)[[0, 0, 2, 3, 4]]
    ranks = sorted(float(str(example["rank"])) for example in examples(pair, pair))
    assert ranks == [1, 1, 1, 1.5, 1.5]
