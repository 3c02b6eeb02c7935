"""What validation found, as one page that needs no other server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ name }}: validation</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21 }
table { border-collapse: collapse; width: 100% } th { text-align: left; font-weight: 600 }
td, th { padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #e3e5e8; vertical-align: top }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums } .fine { color: #8a8f98 }
.quarantine, .stop { color: #a33b12 } .warn { color: #8a6100 } small { display: block; color: #5d636b }
.bar { display: flex; height: .8rem; margin: .5rem 0 1.5rem } .bar div { background: #2458a6 }
.bar div + div { background: #d1702c }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{{ "{:,}".format(counts.read) }} rows read = <b>{{ "{:,}".format(counts.valid) }}</b> valid
+ <b>{{ "{:,}".format(counts.quarantined) }}</b> in quarantine</p>
<div class="bar"><div style="flex: {{ counts.valid }}"></div><div style="flex: {{ counts.quarantined }}"></div></div>
<h2>Rows</h2>
<table>
<tr><th>check</th><th>looks for</th><th class="number">rows</th><th class="number">share</th><th>done</th></tr>
{% for check, found in counts.checks.items() %}
<tr class="{{ 'fine' if not found.rows }}"><td>{{ check }}</td>
<td>{{ looks_for[check] }}
{% for example in counts.examples.get(check, []) %}<small>{{ example }}</small>{% endfor %}</td>
<td class="number">{{ "{:,}".format(found.rows) }}</td>
<td class="number">{{ "%.2f %%" | format(100 * found.rows / [counts.read, 1] | max) }}</td>
<td class="{{ found.severity if found.rows }}">{{ found.severity }}</td></tr>
{% endfor %}
</table>
<h2>All rows together</h2>
<table>
{% for bound, found in counts.bounds.items() %}
<tr class="{{ 'warn' if not found.kept }}"><td>{{ bound }}</td>
<td>{{ looks_for[bound] }}, at most {{ found.limit }}</td>
<td class="number">{{ found.value }}</td></tr>
{% endfor %}
{% for statistic, value in counts.statistics.items() %}
<tr class="fine"><td>{{ statistic }}</td><td></td><td class="number">{{ "{:,}".format(value) }}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""


def validation_page(name: str, counts: Mapping[str, Any], looks_for: Mapping[str, str]) -> str:
    """The counts of `steps.validate` as HTML; all text in it is escaped.

    Args:
        looks_for: what each check or bound looks for, by name.
    """
    return Environment(autoescape=True).from_string(PAGE).render(name=name, counts=counts, looks_for=looks_for)
