"""`prunesid doctor REPO`: what of a repo's code is not as the package writes it."""

import json
import shutil

import pytest
from tiny_checkpoint import save_checkpoint

from modeling_prunesid import PruneSIDLlavaForConditionalGeneration
from prunesid_cli.command import main
from prunesid_cli.repo_check import check_repo, count_code


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    base = save_checkpoint(tmp_path_factory.mktemp("base"))
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(base, prunesid_config={"budget": 8})
    model.save_pretrained(tmp_path_factory.mktemp("repo") / "variant", thin=True)
    return tmp_path_factory.getbasetemp() / "repo0" / "variant"


@pytest.fixture
def repo(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "variant")


def test_the_code_of_a_variant_is_counted_and_found_to_be_the_packages(saved, capsys):
    main(["doctor", str(saved)])
    said = capsys.readouterr().out
    report = json.loads(said.splitlines()[-1])
    files = list(saved.glob("*.py"))
    lines = sum(len(path.read_text().splitlines()) for path in files)
    assert (report["files"], report["lines"], report["problems"]) == (len(files), f"{lines:,}", [])
    assert said.count("as the package writes it") == len(files) and "Problems: none" in said


def test_what_differs_is_added_or_is_missing_is_named(repo):
    with (repo / "selection.py").open("a") as file:
        file.write("\nimport os\n")
    (repo / "custom_generate").mkdir()
    (repo / "custom_generate" / "generate.py").write_text("print('mine')\n")
    (repo / "broken.py").write_bytes(b"def \xff(:\n")
    (repo / "exact.py").unlink()
    rows, problems = check_repo(str(repo))
    assert [problem.split(" is ")[0].split(" differs ")[0] for problem in problems] == [
        "broken.py", "custom_generate/generate.py", "selection.py", "exact.py",
    ]  # fmt: skip
    assert {row["file"]: row["found"] for row in rows}["selection.py"] == "differs in 2 lines"


def test_code_of_another_repo_is_named(repo):
    fields = json.loads((repo / "config.json").read_text())
    fields["auto_map"]["AutoModel"] = "somebody/else--modeling_prunesid_llava.PruneSIDLlavaAutoModel"
    (repo / "config.json").write_text(json.dumps(fields))
    (problem,) = check_repo(str(repo))[1]
    assert problem.startswith("Code of another repo runs: somebody/else--modeling_prunesid_llava")


@pytest.mark.parametrize("fields", [{}, {"prunesid_config": {"budget": 8}}, {"auto_map": {"AutoModel": "a.B"}}])
def test_what_is_no_repo_of_ours_is_refused(tmp_path, fields, capsys):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(SystemExit):
        main(["doctor", str(tmp_path)])
    assert "is no repo of this package" in capsys.readouterr().err


def test_lines_of_code_are_those_without_comments_docstrings_and_blank_ones():
    source = (
        '"""About."""\n\nimport os  # why\n\n\n# alone\ndef f():\n    """What."""\n    return (\n        1\n    )\n'
    )
    assert count_code(source) == 5
