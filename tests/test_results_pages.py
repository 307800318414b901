"""Pages that are written from tables: which budget for which task, the tables of README, and those of the paper."""

import importlib
import json
import random
import sys
from pathlib import Path

import pytest

from prunesid_cli.answer_statistics import summarise
from prunesid_cli.command import build_parser, import_command
from prunesid_cli.scenes import KINDS, Question


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scripts():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("results_pages"), importlib.import_module("paper_tables")


@pytest.fixture
def result():
    """What `prunesid evaluate` writes of two methods: one loses reading above all, random all but presence."""
    rng, found = random.Random(0), {"questions": [], "scenes": [], "variants": [], "answers": {}, "tokens": {}}
    for scene in range(60):
        found["variants"].append(("salient", "context")[scene % 2])
        for kind in KINDS:
            found["questions"].append(Question(kind, "", "yes"))
            found["scenes"].append(scene)
    skills = {
        ("full", 576): {},
        ("prunesid-spread", 192): {"reading": 0.9}, ("prunesid-spread", 64): {"reading": 0.5, "count": 0.6},
        ("random", 192): dict.fromkeys(KINDS[1:], 0.4), ("random", 64): dict.fromkeys(KINDS[1:], 0.1),
    }  # fmt: skip
    for case, skill in skills.items():
        found["answers"][case] = [
            q.answer if rng.random() < skill.get(q.kind, 1) else "no" for q in found["questions"]
        ]
        found["tokens"][case] = float(case[1])
    own = summarise(found, lambda question: "no")
    for row in own["rows"]:
        row |= {"place": "encoder", "first_token_ms": 100.0 + row["budget"]}
    return {"machine": "a machine", "split": "test", **own}


def test_the_smallest_budget_is_that_above_which_nothing_is_lost(scripts, result):
    pages = scripts[0]
    free = {kind: pages.smallest_free(result, "prunesid-spread", kind) for kind in KINDS}
    assert free == {"presence": 64, "count": 192, "where": 64, "colour": 64, "reading": None, "region": 64}
    assert pages.smallest_free(result, "random", "presence") == 64
    assert pages.smallest_free(result, "random", "region") is None


def test_the_pages_say_what_the_tables_hold(scripts, result, tmp_path):
    pages = scripts[0]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "accuracy.json").write_text(json.dumps(result))
    cases = [(None, 1000.0, 1.0), (None, 990.0, 1.01), (192, 500.0, 2.0), (64, 250.0, 4.0)]
    rows = [{"budget": budget, "first_token_ms": ms, "speedup": speedup} for budget, ms, speedup in cases]
    (tmp_path / "docs" / "demo.json").write_text(json.dumps({"rows": rows}))
    ratios = {name: {"192": 2.5, "64": 5.0} for name in ("prefill_ratio", "kv_cache_ratio")}
    (tmp_path / "docs" / "benchmark.json").write_text(json.dumps(ratios))
    marked = "# T\n\nbefore <!-- accuracy -->\nold\n<!-- end -->\n\nafter\n"
    for page in ("README.md", "docs/results.md"):
        (tmp_path / page).write_text(marked)
    pages.main(["--root", str(tmp_path)])
    page = (tmp_path / "docs" / "which_budget.md").read_text()
    assert "| reading | what is printed? |" in page and "- reading (TextVQA" in page and "**do not prune**" in page
    assert "- presence (POPE): no loss can be measured down to 64 tokens; one of up to 0 points is not" in page
    assert page.index("- presence") < page.index("- count") < page.index("- reading")
    readme = (tmp_path / "README.md").read_text()
    assert (
        "old" not in readme and readme.startswith("# T\n\nbefore <!--") and readme.endswith(" <!-- end -->\n\nafter\n")
    )
    lines = [line for line in readme.splitlines() if line.startswith("| ")]
    assert lines[0] == "| method | 192 tokens | 64 tokens | first token at 192 | first token at 64 |"
    assert lines[2].startswith(
        "| speed-up to the first token, SmolLM2-135M (1,000 ms with all tokens) | 2.00x | 4.00x |"
    )
    assert [line.count("| 2.5x | 5.0x |") for line in lines[3:5]] == [1, 1]
    assert lines[5].startswith("| **relative accuracy**, all tokens | 100 | 100 |")
    assert lines[6].startswith("| **spread** (ours) | ") and " = | " in lines[6] and "| 292 ms | 164 ms |" in lines[6]
    assert lines[7].startswith("| random | ") and "=" not in lines[7]
    again = readme
    pages.main(["--root", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == again
    (tmp_path / "README.md").write_text("no place")
    with pytest.raises(ValueError, match="README.md must have one pair of <!-- accuracy --> and <!-- end -->, got 0"):
        pages.main(["--root", str(tmp_path)])


def test_tables_of_before_are_refused(scripts, result, tmp_path):
    for row in result["rows"]:
        del row["to_full_by_type"]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "accuracy.json").write_text(json.dumps(result))
    with pytest.raises(ValueError, match="no intervals by question type. Measure it anew"):
        scripts[0].write(tmp_path)


# The paper's tables


CLIENT = """
import json, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
task, folder = given["--tasks"], Path(given["--output_path"])
variant = given["--model_args"].split(",")[0].removeprefix("pretrained=")
config = json.loads((Path(variant) / "config.json").read_text())["prunesid_config"]
with open(LOG, "a") as log:
    log.write(f"{task} {config['budget']}\\n")
if task == "mme" and BROKEN.exists():
    sys.exit("the disk is full")
if task == "mme" and BROKEN.with_name("silent").exists():
    sys.exit(0)  # as lmms-eval ends after an error
values = {"pope_f1_score,none": 0.8 if config["budget"] == 1.0 else 0.6, "pope_yes_ratio,none": 0.5}
if task == "mme":
    values = {"mme_perception_score,none": 1000.0 + 200 * (config["budget"] == 1.0), "mme_cognition_score,none": 300.0}
(folder / "repo").mkdir(parents=True)
(folder / "repo" / "2026_results.json").write_text(json.dumps({"results": {task: values}}))
"""


@pytest.fixture
def lmms(tmp_path, monkeypatch):
    """A stand-in for the client: a package lmms_eval in front of the path, that logs what it is asked."""
    package = tmp_path / "site" / "lmms_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    log, broken = tmp_path / "asked", tmp_path / "broken"
    head = f"from pathlib import Path\nLOG, BROKEN = {str(log)!r}, Path({str(broken)!r})\n"
    (package / "__main__.py").write_text(head + CLIENT)
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{ROOT}")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return log, broken


def test_a_table_is_measured_beside_the_papers_and_goes_on(scripts, lmms, tmp_path, monkeypatch, capsys):
    tables, (log, broken) = scripts[1], lmms
    rows = (
        tables.Row("vanilla", None, (85.9, 1862, 66.8), 100),
        tables.Row("8", "llava_1.5_64", (83.8, 1733, None), 95.9),
    )
    for name, budget in (("vanilla", 1.0), ("8", 8)):
        (tmp_path / "out" / "variants" / name).mkdir(parents=True)
        settings = {"prunesid_config": {"budget": budget}}
        (tmp_path / "out" / "variants" / name / "config.json").write_text(json.dumps(settings))
    monkeypatch.setitem(tables.TABLES, 1, tables.Table("base", ("POPE", "MME", "LLaVA-B"), rows))
    broken.touch()
    tables.main(["1", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "FAILED, see " in said and "the disk is full" in said and "wants a judge's key" in said
    assert json.loads(said.splitlines()[-1])["missing"] == ["vanilla MME", "vanilla LLaVA-B", "8 MME", "8 LLaVA-B"]
    assert log.read_text().splitlines() == ["pope 1.0", "mme 1.0", "pope 8", "mme 8"]
    broken.replace(broken.with_name("silent"))
    tables.main(["1", "--out", str(tmp_path / "out"), "--rows", "8", "--columns", "MME"])
    assert "FAILED, see " in (said := capsys.readouterr().out) and "lmms-eval ended without results" in said
    broken.with_name("silent").unlink()
    tables.main(["1", "--out", str(tmp_path / "out")])
    assert log.read_text().splitlines()[5:] == ["mme 1.0", "mme 8"]
    assert (tmp_path / "out" / "table.md").read_text().splitlines() == [
        "|  | POPE | MME | LLaVA-B | Avg. |",
        "| --- | --- | --- | --- | --- |",
        "| vanilla | 80.0 (85.9) | 1500 (1862) | - (66.8) | 100.0 (100.0) % |",
        "| 8 | 60.0 (83.8) | 1300 (1733) | - (?) | 80.8 (95.9) % |",
    ]
    with pytest.raises(ValueError, match="--columns must be among POPE, MME, LLaVA-B, got 'GQA'"):
        tables.main(["1", "--out", str(tmp_path / "out"), "--columns", "GQA"])
    with pytest.raises(ValueError, match="--base must name the checkpoint of table 3"):
        tables.main(["3", "--out", str(tmp_path / "out")])


def test_variants_are_made_by_commands_that_parse(scripts, tmp_path, monkeypatch):
    tables, asked = scripts[1], []
    monkeypatch.setattr(tables, "call", lambda command, log: asked.append(command) or True)
    for row in tables.TABLES[1].rows[:3]:
        assert tables.variant_of(row, "base", tmp_path) == tmp_path / "variants" / row.name
    vanilla, fixed, calibrated, dynamic = (
        build_parser(command[3], import_command(command[3])).parse_args(command[3:]) for command in asked
    )
    assert (vanilla.budget, vanilla.preset, vanilla.thin) == (1.0, None, True)
    assert fixed.preset == calibrated.preset == "llava_1.5_192" and str(calibrated.output) == dynamic.preset
    monkeypatch.setattr(tables, "call", lambda command, log: False)
    assert all(tables.variant_of(row, "base", tmp_path) is None for row in tables.TABLES[1].rows[:3])


def test_a_python_without_the_client_is_named(scripts, tmp_path):
    with pytest.raises(OSError, match="has no lmms_eval. docs/lmms_eval.md says"):
        scripts[1].lmms_folder(sys.executable)


def test_the_papers_averages_are_those_of_its_figures(scripts):
    """Each table's Avg. is the mean share of the uncompressed model, within what its rounding and ours allow."""
    tables = scripts[1]
    for table in tables.TABLES.values():
        vanilla = list(table.rows[0].paper)
        assert all(len(row.paper) == len(table.columns) for row in table.rows)
        for row in table.rows:
            if None not in row.paper and len(row.paper) > 1:
                assert tables.average_of(list(row.paper), vanilla) == pytest.approx(row.average, abs=0.6), row.name


def test_presets_of_the_tables_exist(scripts):
    for table in scripts[1].TABLES.values():
        for row in table.rows:
            assert row.preset is None or (ROOT / "configuration" / f"{row.preset}.json").exists()
