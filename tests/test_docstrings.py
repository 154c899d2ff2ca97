"""Docstrings of public functions name the shape of every tensor that they take."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "k_diffusion"

# A shape in parentheses: (), (...), or a tuple such as (n,), (n, ...), (3, h, w).
SHAPE = r"\((?:|\.\.\.|[^()\s]+,[^()]*|[^(),]+,[^()]*)\)"

# (file, name): the reason why shapes are not named.
EXCEPTIONS = {
    ("checkpoints/__init__.py", "write_inference"): "weights: tensors, each of its own shape",
}


def is_tensor(annotation: ast.expr | None) -> bool:
    text = ast.unparse(annotation) if annotation else ""
    return bool(re.search(r"\bTensor\b", text)) and "Callable" not in text


def functions(
    node: ast.Module | ast.ClassDef, prefix: str = "", doc: str = ""
) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """(qualified name, function, its docstring and that of its class) of all that is public."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from functions(child, f"{prefix}{child.name}.", ast.get_docstring(child) or "")
        elif isinstance(child, ast.FunctionDef) and (
            not child.name.startswith("_") or child.name in ("__init__", "__call__")
        ):
            own = ast.get_docstring(child) or ""
            yield prefix + child.name, child, f"{own}\n\n{doc}"


def unnamed(function: ast.FunctionDef, doc: str) -> list[str]:
    """The tensor parameters that have no shape beside their names, in the same sentence."""
    args = function.args
    names = [
        arg.arg
        for arg in [*args.posonlyargs, *args.args, *args.kwonlyargs]
        if is_tensor(arg.annotation)
    ]
    sentence = r"(?:(?!\. |\.\n|\n\n).)*?"
    return [
        name
        for name in names
        if not re.search(rf"\b{re.escape(name)}\b{sentence}{SHAPE}", doc, re.DOTALL)
    ]


def public_functions() -> list[tuple[str, str, ast.FunctionDef, str]]:
    # Backend.run and Step say once what the functions of their signatures take and give
    backend, step = ["q", "k", "v", "geometry"], ["ctx", "x", "sigma", "sigma_next", "denoised"]
    return [
        (file, *found)
        for path in sorted(PACKAGE.rglob("*.py"))
        for file in [path.relative_to(PACKAGE).as_posix()]
        for found in functions(ast.parse(path.read_text()))
        for names in [[arg.arg for arg in found[1].args.args]]
        if names != backend and names[: len(step)] != step
    ]


def test_shapes_are_named():
    missing = [
        f"k_diffusion/{file}:{function.lineno}: {name} names no shape of {', '.join(left)}"
        for file, name, function, doc in public_functions()
        if (file, name) not in EXCEPTIONS and (left := unnamed(function, doc))
    ]
    assert not missing, "\n".join(missing)


def test_exceptions_are_needed():
    needed = {
        (file, name) for file, name, function, doc in public_functions() if unnamed(function, doc)
    }
    assert not EXCEPTIONS.keys() - needed


@pytest.mark.parametrize(
    ("doc", "named"),
    [
        ("x: (n, ...).", True),
        ("x, y: (n,).", True),
        ("The mean of x: ().", True),
        ("Of x, in any shape (...).", True),
        ("Takes x. y: (n,).", False),
        ("x as in the paper (2022).", False),
        ("", False),
    ],
)
def test_of_the_check_itself(doc, named):
    tree = ast.parse("def f(x: torch.Tensor, g: Callable[[Tensor], int], n: int): ...")
    assert unnamed(tree.body[0], doc) == ([] if named else ["x"])
