"""A parsed chat template is checked and changed before it is compiled: all that it does goes through functions.

The functions keep marks and spend work. ``template_environment`` has them under the names that are used here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.visitor import NodeTransformer

from splitbundle.text.template_limits import NODE, LimitReached

__all__ = ["guarded"]

_ALLOWED: Final = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Macro, nodes.CallBlock),
    *(nodes.FilterBlock, nodes.Assign, nodes.AssignBlock, nodes.With, nodes.Break, nodes.Continue, nodes.Scope),
    *(nodes.Name, nodes.NSRef, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword),
    *(nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Getattr, nodes.Slice),
    *(nodes.Compare, nodes.Operand, nodes.Concat, nodes.BinExpr, nodes.UnaryExpr),
)
_STATEMENTS: Final = 32
"""How deep statements may be nested. Python allows 20 loops in each other, and 100 levels in all."""
_NODES: Final = 40_000
"""How many pieces of syntax a template may have."""


def guarded(tree: nodes.Template) -> nodes.Template:
    """Return the parsed template with functions in place of all that could lose marks or take too long.

    Raises:
        SecurityError: it includes, extends or imports another one, or has syntax that chat templates don't need.
        LimitReached: it is too large, or nested too deep.
    """
    _Guard().visit(tree)
    return tree


def _through(name: str, value: nodes.Node, *values: nodes.Node) -> nodes.Filter:
    return nodes.Filter(cast(nodes.Expr, value), name, list(values), [], None, None, lineno=value.lineno)


class _Guard(NodeTransformer):
    def __init__(self) -> None:
        self.size, self._depth, self._line = 0, 0, 1

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._line = getattr(node, "lineno", None) or self._line
        self.size += 1
        if self.size > _NODES:
            raise LimitReached(f"a template of more than {_NODES} pieces of syntax")
        if not isinstance(node, _ALLOWED):
            raise SecurityError(f"line {self._line}: chat templates have no {type(node).__name__}")
        change: Callable[[Any, Any], Any] = self._CHANGED.get(type(node), NodeTransformer.generic_visit)
        if not isinstance(node, nodes.Stmt):
            return change(self, node)
        self._depth += 1
        if self._depth > _STATEMENTS:
            raise LimitReached(f"statements that are nested more than {_STATEMENTS} levels deep")
        made = change(self, node)
        self._depth -= 1
        return made

    def _with_its_cost(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> None:
        """Let the body of a loop or macro spend work for its own size, each time that it runs."""
        before = self.size
        self.generic_visit(node)
        work = nodes.Const(NODE * (self.size - before), lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(_through("spend work", work), lineno=node.lineno))

    def _for(self, node: nodes.For) -> nodes.Node:
        before = self.size
        self._with_its_cost(node)
        node.iter = _through("loop over", node.iter)
        if node.test is not None:
            work = nodes.Const(NODE * (self.size - before), lineno=node.lineno)
            node.test = nodes.And(_through("spend work", work), node.test, lineno=node.lineno)
        return node

    def _macro(self, node: nodes.Macro) -> nodes.Node:
        self._with_its_cost(node)
        return node

    def _call_block(self, node: nodes.CallBlock) -> nodes.Node:
        self._with_its_cost(node)
        return node

    def _call(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _through("use as arguments", node.dyn_args)
        if node.dyn_kwargs is not None:
            node.dyn_kwargs = _through("use as keywords", node.dyn_kwargs)
        return node

    def _concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("concatenate", nodes.Tuple(node.nodes, "load", lineno=node.lineno))

    def _getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _through("slice by", node.node, *(each or nodes.Const(None, lineno=node.lineno) for each in bounds))

    def _pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        node.key = _through("use as key", node.key)
        return node

    def _compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        if any(each.op in ("in", "notin") for each in node.ops):
            if len(node.ops) > 1:
                raise SecurityError(f"line {node.lineno}: chat templates have no chains of comparisons with in")
            found = _through("is in", node.expr, node.ops[0].expr)
            return found if node.ops[0].op == "in" else nodes.Not(found, lineno=node.lineno)
        node.expr = _through("compare", node.expr)
        for each in node.ops:
            each.expr = _through("compare", each.expr)
        return node

    _CHANGED: Final[dict[type[nodes.Node], Callable[[Any, Any], Any]]] = {
        nodes.For: _for,
        nodes.Macro: _macro,
        nodes.CallBlock: _call_block,
        nodes.Pair: _pair,
        **dict.fromkeys((nodes.Call, nodes.Filter, nodes.Test), _call),
        nodes.Concat: _concat,
        nodes.Getitem: _getitem,
        nodes.Compare: _compare,
    }
