"""A table for notebooks, in plain HTML: what ``_repr_html_`` of a run, a fit and a forecast return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

UNKNOWN = "–"


def table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys under a caption; all text is escaped.

    A value is text, a number, None for not known, or a mapping with ``identified`` that stands for an estimate with its
    interval: one that the data do not identify shows no number.
    """
    heads = "".join(f"<th>{escape(name)}</th>" for name in (rows[0] if rows else ()))
    body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    told = escape("".join(c if c.isprintable() else "?" for c in caption[:300]))
    return f"<table><caption>{told}</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return _estimate(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:,.4g}"
    return UNKNOWN if value is None else escape(str(value)[:300])


def _estimate(value: Mapping[str, Any]) -> str:
    if value.get("status") in ("none", "not_within_schedule"):
        return str(value["status"]).replace("_", " ")
    if not value["identified"]:
        return "not identified"
    middle = value["step"] if "step" in value else value["value"]
    return f"{_cell(middle)} [{_cell(value['low'])}, {_cell(value['high'])}]"
