"""The documentation agrees with the code: pages, links, commands, imports, messages, data."""

import ast
import importlib
import inspect
import re
import shlex
from importlib.metadata import metadata
from pathlib import Path

import pytest
import typer
import yaml

from expertsteer.cli.app import app
from expertsteer.data import EffectWords, load_examples
from expertsteer.study import load_study
from helpers import load_script

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# A study's report is a result, not a page.
PAGES = [page for page in PAGES if page.name != "report.md"]
LANGUAGES = {"python", "bash", "console", "jsonl", "csv", "yaml"}
# Programs a reader has before this package, with nothing of ours in their arguments.
FOREIGN = {"export", "llama-server", "python", "source", "vllm"}


def blocks(path):
    """Yield language, first line's number and text of a page's code blocks."""
    language, start, lines = None, 0, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"\s*```(\w*)\s*$", line)
        if fence is None and line.lstrip().startswith("```"):
            raise AssertionError(f"{path}:{number}: unusual fence {line!r}")
        if fence is None:
            lines.append(line)
        elif language is None:
            language, start, lines = fence[1], number + 1, []
        else:
            yield language, start, "\n".join(lines)
            language = None
    assert language is None, f"{path}: a code block is not closed"


def prose(path):
    """Return a page without its code blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


BLOCKS = [(page, *block) for page in PAGES for block in blocks(page)]


def cases(*languages):
    return [
        pytest.param(text, id=f"{page.relative_to(ROOT)}:{line}")
        for page, language, line, text in BLOCKS
        if language in languages
    ]


def shell_commands():
    for page, language, line, text in BLOCKS:
        if language not in ("bash", "console"):
            continue
        joined = re.sub(r"\\\n\s*", "", text).splitlines()
        if language == "console":  # the rest is what the command prints
            joined = [command[2:] for command in joined if command.startswith("$ ")]
        for command in joined:
            words = shlex.split(command, comments=True)
            if words:
                yield pytest.param(words, id=f"{page.relative_to(ROOT)}:{line}:{words[:2]}")


def slug(heading):
    text = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


@pytest.fixture(scope="module")
def generate():
    return load_script(ROOT / "docs/generate.py")


def test_command_line_page_is_current(generate):
    assert generate.COMMAND_LINE.read_text(encoding="utf-8") == generate.command_line_page()


def test_tables_of_results_are_current(generate):
    assert generate.METHOD.read_text(encoding="utf-8") == generate.method_page()


def test_tables_of_findings_are_current(generate):
    assert generate.FINDINGS.read_text(encoding="utf-8") == generate.findings_page()


def test_page_of_performance_is_current(generate):
    assert generate.PERFORMANCE.read_text(encoding="utf-8") == generate.performance_page()


def test_missing_results_are_named(generate, tmp_path, monkeypatch):
    missing = generate.ROOT / "docs/results/none.json"
    monkeypatch.setattr(generate, "COMPARISON", missing)
    monkeypatch.setattr(generate, "REMAKE", {missing: "a command"})
    with pytest.raises(generate.GenerationError, match=r"docs/results/none.json.*a command"):
        generate.method_page()


def test_every_command_and_option_is_in_the_reference(generate):
    page = generate.command_line_page()
    commands = typer.main.get_command(app).commands
    for name, command in commands.items():
        section = page.split(f"## `expertsteer {name}`")[1].split("\n## ")[0]
        for parameter in command.params:
            shown = (
                parameter.opts if parameter.opts[0].startswith("-") else [parameter.name.upper()]
            )
            for option in shown:
                assert re.search(rf"`{option}( \w+)?`", section), (name, option)


def test_code_blocks_are_of_checked_languages():
    assert {language for _, language, _, _ in BLOCKS} <= LANGUAGES


@pytest.mark.parametrize("text", cases("python"))
def test_python_compiles_and_its_imports_exist(text):
    tree = ast.parse(text)
    compile(tree, "block", "exec")
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("words", list(shell_commands()))
def test_command_is_understood(words, tmp_path, monkeypatch):
    # What a launcher starts is a command like any other.
    if "torchrun" in words:
        words = words[words.index("-m") + 1 :]
    program, *arguments = words
    if program == "expertsteer":
        parse(arguments, tmp_path, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(arguments) <= set(targets)
    elif program == "pip":
        extras = metadata("expertsteer").get_all("Provides-Extra")
        for listed in re.findall(r"\[(.*?)\]", " ".join(arguments)):
            assert set(listed.split(",")) <= set(extras)
    elif program == "expertsteer-lm-eval":
        from expertsteer.evaluation.harness import SteeredHarnessModel

        assert f"\n{program} = " in (ROOT / "pyproject.toml").read_text()
        given = arguments[arguments.index("--model_args") + 1]
        named = {argument.partition("=")[0] for argument in given.split(",")}
        assert named <= set(inspect.signature(SteeredHarnessModel).parameters)
    else:
        assert program in FOREIGN


def parse(arguments, tmp_path, monkeypatch):
    """Have the real command line read arguments, without running the command."""
    monkeypatch.chdir(tmp_path)  # outputs are checked to be writable
    group = typer.main.get_command(app)
    if arguments == ["--help"]:
        return
    command = group.commands[arguments[0]]
    if "--help" in arguments:
        return
    if "--config" in arguments:
        required = {p.name: "x" for p in command.params if p.required}
        path = tmp_path / arguments[arguments.index("--config") + 1]
        path.write_text(yaml.safe_dump({"command": arguments[0]} | required))
    context = command.make_context(arguments[0], list(arguments[1:]))
    assert not context.args


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        linked = (page.parent / place).resolve() if place else page
        assert linked.is_file(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(linked), re.M)
            assert anchor in map(slug, headings), link


def test_documented_modules_exist():
    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    documented = re.findall(r"^::: (\S+)$", text, re.M)
    assert documented
    for name in documented:
        importlib.import_module(name)


def test_public_names_are_in_the_python_reference():
    import expertsteer

    text = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    for name in set(expertsteer.__all__) - {"__version__"}:
        assert re.search(rf"^    {name},$", text, re.M), name


@pytest.mark.parametrize("language", ["jsonl", "csv"])
def test_example_data_loads(language, tmp_path):
    page = ROOT / "docs/data-formats.md"
    texts = [text for where, kind, _, text in BLOCKS if where == page and kind == language]
    assert texts
    for text in texts:
        path = tmp_path / f"example.{language}"
        path.write_text(text)
        assert set(load_examples(path).labels) == {-1, 1}


def test_every_kind_of_row_has_an_example(tmp_path):
    from expertsteer.data import KINDS

    text = (ROOT / "docs/data-formats.md").read_text(encoding="utf-8")
    for kind in KINDS:
        section = text.split(f": `{kind}`\n")[1].split("\n## ")[0]
        path = tmp_path / "example.jsonl"
        path.write_text(re.search(r"```jsonl\n(.*?)```", section, re.S)[1])
        load_examples(path, kind=kind)


@pytest.mark.parametrize("text", cases("yaml"))
def test_yaml_is_a_file_of_ours(text, tmp_path):
    values = yaml.safe_load(text)
    if "command" in values:
        command = typer.main.get_command(app).commands[values.pop("command")]
        assert set(values) <= {parameter.name for parameter in command.params}
    elif "targets" in values:
        path = tmp_path / "study.yaml"
        path.write_text(text)
        load_study(path)
    else:
        path = tmp_path / "words.yaml"
        path.write_text(text)
        EffectWords.load(path)


def messages():
    """Yield every string of the source, with … for what is filled in."""
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "…"
                    for part in node.values
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_explained_errors_are_those_of_the_code():
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^### `(.+)`$", text, re.M)
    assert len(explained) == text.count("\n### ")
    known = list(messages())
    for heading in explained:
        pattern = re.compile(".*?".join(map(re.escape, heading.split("…"))), re.S)
        assert any(pattern.search(message) for message in known), heading
