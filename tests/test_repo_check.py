"""`prunesid doctor REPO`: what of a repo's code is not as the package writes it."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import save_checkpoint

import prunesid_cli
from modeling_prunesid import PruneSIDLlavaForConditionalGeneration, method_spread, methods
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


@pytest.mark.parametrize(
    "file, fields",
    [
        ("processor_config.json", {"auto_map": {"AutoProcessor": "somebody/else--x.Y"}}),
        ("processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "somebody/else--x.Y"}}}),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "somebody/else--x.Y"}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "somebody/else--x.Y"]}}),
    ],
)
def test_code_of_another_repo_is_named_wherever_it_is(repo, file, fields):
    path = repo / file
    given = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**given, **fields}))
    assert check_repo(str(repo))[1] == ["Code of another repo runs: somebody/else--x.Y. Read it as well."]


def test_a_registered_method_is_the_one_file_to_read(repo, tmp_path, monkeypatch):
    source = Path(method_spread.__file__).read_text().replace("from .", "from modeling_prunesid.")
    (tmp_path / "own_method.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.METHODS, "own", importlib.import_module("own_method").select)
    monkeypatch.setitem(methods.MODULES, "own", "own_method")
    settings = {"budget": 8, "method": "own", "method_settings": {"score": "attention"}}
    model = PruneSIDLlavaForConditionalGeneration.from_pretrained(repo, prunesid_config=settings)
    model.save_pretrained(tmp_path / "own", thin=True)
    monkeypatch.delitem(methods.MODULES, "own")
    (problem,) = check_repo(str(tmp_path / "own"))[1]
    assert problem.startswith("method_own.py is not of the package.")
    (tmp_path / "own" / "attention.py").unlink()
    (tmp_path / "own" / "method_own.py").unlink()
    assert [problem.split(" is ")[0] for problem in check_repo(str(tmp_path / "own"))[1]] == [
        "attention.py", "method_own.py",
    ]  # fmt: skip


def test_the_embedded_folder_has_the_files_of_the_package(capsys):
    main(["doctor", str(Path(prunesid_cli.__file__).parents[1] / "embedded")])
    said = capsys.readouterr().out
    assert "Problems: none" in said and "as in the package" in said


@pytest.mark.parametrize(
    "change, said",
    [
        ({"auto_map": ["modeling_prunesid_llava.A"]}, "is no repo of this package"),
        ({"auto_map": "modeling_prunesid_llava.A"}, "is no repo of this package"),
        ({"auto_map": {"AutoModel": None, "AutoConfig": 3}}, "is no repo of this package"),
        ({"prunesid_config": []}, "is no repo of this package"),
        ({"prunesid_config": {"method": ["paper"]}}, "prunesid_config.method must be"),
        ({"prunesid_config": {"method": {}}}, "prunesid_config.method must be"),
        ({"prunesid_config": {"method": "../other"}}, "prunesid_config.method must be one of"),
        ({"prunesid_config": {"budget": "many"}}, "prunesid_config.budget must be"),
    ],
)
def test_fields_of_another_type_are_a_sentence(repo, change, said, capsys):
    fields = json.loads((repo / "config.json").read_text())
    (repo / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(repo)])
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_folder_has_no_revision(repo, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", str(repo), "--revision", "main"])
    assert "--revision=main is of a repo on the Hub" in capsys.readouterr().err


def test_a_file_is_no_repo(repo, capsys):
    with pytest.raises(SystemExit):
        main(["doctor", str(repo / "config.json")])
    assert "is a file. Name the folder that it is in" in capsys.readouterr().err


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
