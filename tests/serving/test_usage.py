"""Reading what was used: JSON by module, or a server's metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeroute.adapters.bank import Bank
from mergeroute.adapters.errors import DataError
from mergeroute.serving.usage import read_usage


def test_a_json_object_is_taken_as_it_is(bank: Bank, tmp_path: Path) -> None:
    file = tmp_path / "usage.json"
    file.write_text('{"digit": 3, "upper": 1.5}')
    assert read_usage(file, bank) == {"digit": 3, "upper": 1.5}


def test_what_metrics_gave_counts_the_banks_own_modules(bank: Bank, tmp_path: Path) -> None:
    file = tmp_path / "metrics.txt"
    file.write_text(
        "# HELP mergeroute_module_weight_total Weight\n"
        "# TYPE mergeroute_module_weight_total counter\n"
        f'mergeroute_module_weight_total{{bank="{bank.name}",module="digit"}} 12.5\n'
        'mergeroute_module_weight_total{bank="else",module="upper"} 3.0\n'
        f'mergeroute_module_hits_total{{bank="{bank.name}",module="upper"}} 9.0\n'
    )
    assert read_usage(file, bank) == {"digit": 12.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ('{"digit": true}', "'digit' is True: give a number"),
        ('{"digit": "3"}', "'digit' is '3': give a number"),
        (f'{{"digit": 1{"0" * 400}}}', "'digit' is beyond every float"),
        ("what is this\n", "neither a JSON object"),
        ("", "counts no use of modules"),
        ('mergeroute_module_weight_total{bank="else",module="a"} 3.0\n', "of others: else"),
    ],
)
def test_what_says_nothing_of_the_bank_is_refused(
    text: str, words: str, bank: Bank, tmp_path: Path
) -> None:
    file = tmp_path / "usage"
    file.write_text(text)
    with pytest.raises(DataError, match=words):
        read_usage(file, bank)
    with pytest.raises(DataError, match="cannot be read"):
        read_usage(tmp_path / "gone", bank)


def test_modules_that_were_counted_together_are_refused(bank: Bank, tmp_path: Path) -> None:
    file = tmp_path / "metrics.txt"
    file.write_text(
        "# TYPE mergeroute_module_weight_total counter\n"
        f'mergeroute_module_weight_total{{bank="{bank.name}",module="other"}} 1.0\n'
    )
    with pytest.raises(DataError, match="counts modules together as 'other'"):
        read_usage(file, bank)
