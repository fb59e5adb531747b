"""The HTML report of a run directory."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rlhf.config.load import validate
from rlhf.errors import InputError
from rlhf.monitor.group import build_monitor
from rlhf.monitor.report import Sample, side_by_side, write_report
from rlhf.monitor.runfiles import StoredTable

EVIL = "<script>alert('x')</script><img src=https://evil.example/x.png onerror=alert(1)>&amp;"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags, attributes and text; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and "style" not in self._open:
            self.texts.append(data.strip())


def make_run(run_dir: Path, rounds: int = 3, count: int = 3, **config: Any) -> Path:
    data = {"name": "unit", "policy": {"path": EVIL}, "prompts": {"path": "p"}, "rounds": {"count": count}, **config}
    settings = validate(data, "test.yaml")
    with (run_dir / "log.txt").open("w") as out:
        monitor = build_monitor(settings, run_dir, 8, Console(file=out))
        monitor.log("eval", 0, {"eval/score": 0.395})
        for round in range(1, rounds + 1):
            for step in (2 * round - 1, 2 * round):
                monitor.log("step", round, {"train/loss": 0.7 - step / 100, "kl/mean": 0.01 * step}, step=step)
            pairs = {"pairs/kept": 20 + round, "pairs/dropped_tie": 10, "pairs/dropped_long": 1}
            monitor.log("round", round, {**pairs, "timing_s/generate": 6.0, "timing_s/total": 17.0})
        win = {"eval/win_rate": 0.72, "eval/win_rate_low": 0.61, "eval/win_rate_high": 0.83, "eval/score": 0.68}
        monitor.log("eval", rounds, win)
        monitor.table("samples", ["prompt", "before", "after", "score before"], [[EVIL, f"b{EVIL}", "fine", 0.25]])
        monitor.table(EVIL, [EVIL, "n"], [[EVIL, 1]])
        monitor.close(0)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    return run_dir


def test_the_page_shows_the_final_figures(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path))
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    figures = [page.texts[i : i + 3] for i, text in enumerate(page.texts) if text.startswith(("Win rate", "Held-out"))]
    assert figures[0] == ["Win rate against round 0", "0.72", "0.61 to 0.83, round 3"]
    assert figures[1] == ["Held-out judge score", "0.395 → 0.680", "round 0 → round 3"]
    assert "finished: 3 of 3 rounds" in page.texts
    at = page.texts.index("Pairs trained on")
    assert page.texts[at + 1 : at + 3] == ["66", "67% of 99 judged"]
    assert {"Loss", "Pairs by round", "KL from the reference", "Time by round, in seconds"} <= set(page.texts)


def test_all_data_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    (run_dir / "rounds/0001").mkdir(parents=True)
    (run_dir / "rounds/0001/manifest.json").write_text(json.dumps({"state": EVIL}))
    html = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "object", "embed", "base", "use", "image", "a"})
    names = {name for _, attributes in page.tags for name in attributes}
    assert names.isdisjoint({"src", "href", "srcset", "onerror", "onload", "style"})
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]
    assert "prefers-color-scheme: dark" in style[1]
    # policy, prompt, before, table name (heading and caption), column, cell, state, config
    assert "".join(page.texts).count("<script>alert('x')</script>") >= 8


def test_before_and_after_stand_side_by_side_and_other_tables_apart(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)).read_text(encoding="utf-8"))
    at = page.texts.index("Before")
    assert page.texts[at + 1 : at + 3] == ["score 0.25", f"b{EVIL}"]
    assert page.texts[page.texts.index("After") + 1] == "fine"
    assert "Results" in page.texts


@pytest.mark.parametrize(
    ("columns", "titles"),
    [
        (("prompt", "before (round 0)", "after (round 8)"), ("Before (round 0)", "After (round 8)")),
        (("Prompt", "Before", "After"), ("Before", "After")),
        (("prompt", "beforehand", "after"), None),
        (("held-out prompts", "round 0", "round 8"), None),
    ],
)
def test_columns_may_say_which_round(columns: tuple[str, ...], titles: tuple[str, str] | None) -> None:
    samples = side_by_side(StoredTable("samples", list(columns), [["p", "b", "a"]]))
    expected = titles and [Sample("p", "b", "a", "", "", *titles)]
    assert samples == expected


@pytest.mark.parametrize(("rounds", "status"), [(2, "not finished: 2 of 5 rounds"), (5, "finished: 5 of 5 rounds")])
def test_status_counts_rounds(tmp_path: Path, rounds: int, status: str) -> None:
    page = Page(write_report(make_run(tmp_path, rounds, count=5)).read_text(encoding="utf-8"))
    assert status in page.texts


def test_secrets_in_a_config_file_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run(tmp_path)
    monkeypatch.setenv("SERVICE_TOKEN", "hunter2hunter2")
    (run_dir / "config.yaml").write_text("name: unit\nengine: {api_key: abcdef, arg: hunter2hunter2}\n")
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "abcdef" not in html
    assert "hunter2" not in html


def test_charts_have_names_and_their_numbers_as_tables(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path)).read_text(encoding="utf-8"))
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) >= 6
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)
    assert page.texts.count("Numbers") == len(charts)


def test_a_run_without_config_or_rounds_is_reported(tmp_path: Path) -> None:
    run_dir = tmp_path / "bare"
    run_dir.mkdir()
    line = {"event": "step", "round": 1, "step": 1, "time": 0.0, "train/loss": None}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "bare" in page.texts
    assert "svg" not in {tag for tag, _ in page.tags}


def test_a_round_logged_twice_counts_once(tmp_path: Path) -> None:
    lines = [{"event": "round", "round": 1, "time": float(i), "pairs/kept": kept} for i, kept in enumerate((7, 9))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.texts[page.texts.index("Pairs trained on") + 1] == "9"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "not a run directory"),
        ({"metrics.jsonl": ""}, "no metrics yet"),
        ({"metrics.jsonl": '{"event": "torn'}, "no metrics yet"),
        ({"metrics.jsonl": "nonsense\n"}, r"metrics\.jsonl:1"),
        ({"config.yaml": "a: ["}, r"config\.yaml: not valid YAML"),
        ({"config.yaml": "- 1"}, r"config\.yaml: expected a mapping"),
        ({"tables/t.json": "{"}, r"t\.json: not valid JSON"),
        ({"tables/t.json": '{"columns": ["a"], "rows": [[1, 2]]}'}, r"t\.json: not a stored table"),
        ({"rounds/0001/manifest.json": "[]"}, r"manifest\.json: expected a JSON object"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    run_dir = tmp_path / "run"
    if files is not None:
        run_dir.mkdir()
        if files and "metrics.jsonl" not in files:
            (run_dir / "metrics.jsonl").write_text('{"event": "round", "round": 1, "time": 0}\n')
        for name, text in files.items():
            (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        write_report(run_dir)
    assert "\n" not in str(caught.value)
    assert not (run_dir / "report.html").exists()
