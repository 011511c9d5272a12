"""Rules of the source that ruff does not know: docstrings, sizes, banned statements."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.packaging.source_tree import Module, source_modules

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

LONGER_FILES: dict[str, tuple[int, str]] = {}
"""Files that may be longer, with their limit and the reason."""

MODULES = source_modules()


def _nodes(*kinds: type[ast.AST]) -> Iterator[tuple[Module, ast.AST, str]]:
    """Every node of these kinds, with its module and its place as a message shows it."""
    for module in MODULES:
        for node in ast.walk(module.tree):
            if isinstance(node, kinds):
                yield module, node, f"{module.where}:{getattr(node, 'lineno', 0)}"


def _num_lines(module: Module) -> int:
    return len(module.path.read_text("utf-8").splitlines())


def test_every_module_says_what_it_is() -> None:
    silent = [
        module.where
        for module in MODULES
        if module.tree.body and not ast.get_docstring(module.tree)  # empty: marks a package
    ]
    assert not silent


def test_every_public_module_lists_its_names() -> None:
    unlisted = [
        module.where
        for module in MODULES
        if not module.path.name.startswith("_")
        and "_triton" not in module.name
        and not any(
            isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for node in module.tree.body
        )
    ]
    assert not unlisted


def test_files_stay_small() -> None:
    long = {
        module.where: _num_lines(module)
        for module in MODULES
        if _num_lines(module) > LONGER_FILES.get(module.where, (MAX_FILE_LINES, ""))[0]
    }
    assert not long, f"longer than {MAX_FILE_LINES} lines; split them"


def test_functions_stay_small() -> None:
    long = {}
    for _, node, where in _nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        size = (node.end_lineno or 0) - node.lineno + 1
        if size > MAX_FUNCTION_LINES:
            long[f"{where} {node.name}"] = size
    assert not long, f"longer than {MAX_FUNCTION_LINES} lines; split them"


def test_every_longer_file_is_one_and_has_a_reason() -> None:
    lines = {module.where: _num_lines(module) for module in MODULES}
    for where, (limit, reason) in LONGER_FILES.items():
        assert MAX_FILE_LINES < lines[where] <= limit, f"{where}: strike it from the list"
        assert reason


def test_nothing_prints_asks_or_runs_text_as_code() -> None:
    wrong = []
    for module, node, where in _nodes(ast.Call):
        assert isinstance(node, ast.Call)
        banned = {"eval", "exec", "compile", "__import__", "breakpoint"}
        if not module.name.startswith("memrt.cli"):
            banned |= {"print", "input"}
        if isinstance(node.func, ast.Name) and node.func.id in banned:
            wrong.append(f"{where} calls {node.func.id}")
    assert not wrong


def test_nothing_is_global() -> None:
    assert not [where for _, _, where in _nodes(ast.Global)]


def test_no_handler_swallows_every_error() -> None:
    """`except BaseException` may clean up and raise again; nothing may catch all and go on."""
    wrong = []
    for _, node, where in _nodes(ast.ExceptHandler):
        assert isinstance(node, ast.ExceptHandler)
        caught = "BaseException" if node.type is None else ast.unparse(node.type)
        broad = {"Exception", "BaseException"} & {name.strip(" ()") for name in caught.split(",")}
        if broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
            wrong.append(f"{where} catches {caught}")
    assert not wrong


def test_data_and_checkpoints_bring_no_code() -> None:
    """`torch.load` reads tensors only, and nothing unpickles."""
    wrong = []
    for _, node, where in _nodes(ast.Call):
        assert isinstance(node, ast.Call)
        name = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"):
            wrong.append(f"{where} calls {name}")
        if name == "torch.load" and options.get("weights_only") != "True":
            wrong.append(f"{where} calls torch.load without weights_only=True")
    assert not wrong
