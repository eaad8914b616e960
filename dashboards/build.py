#!/usr/bin/env python3
"""Writes the Grafana boards in boards/ from the lists of panels in source/.

    python3 dashboards/build.py            writes them
    python3 dashboards/build.py --check    fails when they are not what would be written

A board is a list of panels from top left to bottom right; where they lie, their numbers, and everything that Grafana wants
to hear of every panel is added here. In an expression JOB stands for the labels that choose jobs, and PROCESS for those that
choose processes.
"""

import importlib
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).parent
BOARDS = ["overview", "training", "memory", "service"]
COLUMNS = 24
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
PROCESS = 'job=~"$job", instance=~"$instance"'
JOB = PROCESS + ', job_id=~"$job_id"'


def steps(thresholds):
    """Colours from a list of (value, colour); the first value is where the scale begins."""
    pairs = thresholds or [(None, "green")]
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in pairs]}


def panel(kind, title, description, unit, targets, width, height, defaults=None, options=None, thresholds=None, limits=None):
    queries = []
    for index, (expression, legend) in enumerate(targets):
        query = {
            "datasource": SOURCE,
            "refId": chr(ord("A") + index),
            "expr": expression.replace("PROCESS", PROCESS).replace("JOB", JOB),
            "legendFormat": legend,
            "editorMode": "code",
        }
        if kind in ("stat", "table", "bargauge"):
            query |= {"instant": True, "range": False}
        if kind in ("table", "heatmap"):
            query["format"] = kind
        queries.append(query)
    fields = {"unit": unit, "thresholds": steps(thresholds)} | (defaults or {}) | (limits or {})
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": fields, "overrides": []},
        "options": options or {},
        "targets": queries,
    }


def graph(title, description, unit, *targets, width=12, height=8, stack=False, thresholds=None, log=False, **limits):
    """Lines over time; with `stack` areas that add up; with thresholds, a line at each."""
    custom = {"lineWidth": 1, "fillOpacity": 40 if stack else 8, "showPoints": "never", "spanNulls": False}
    custom["stacking"] = {"mode": "normal" if stack else "none", "group": "A"}
    if thresholds:
        custom["thresholdsStyle"] = {"mode": "dashed"}
    if log:
        custom["scaleDistribution"] = {"type": "log", "log": 10}
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, description, unit, targets, width, height, {"custom": custom}, options, thresholds, limits)


def stat(title, description, unit, expression, legend="{{job_id}}", width=4, height=4, thresholds=None, **limits):
    """One number, with a colour."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "colorMode": "value",
        "graphMode": "none",
        "textMode": "value_and_name",
    }
    return panel("stat", title, description, unit, [(expression, legend)], width, height, None, options, thresholds, limits)


def bars(title, description, unit, expression, legend="{{job_id}}", width=12, height=6, thresholds=None, **limits):
    """A bar a series."""
    options = {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "horizontal",
        "displayMode": "basic",
    }
    return panel("bargauge", title, description, unit, [(expression, legend)], width, height, None, options, thresholds, limits)


def table(title, description, expression, hidden, width=24, height=6):
    """The labels of an info metric, a line a series."""
    made = panel("table", title, description, "none", [(expression, "")], width, height)
    made["transformations"] = [{"id": "organize", "options": {"excludeByName": dict.fromkeys(hidden, True)}}]
    return made


def heat(title, description, unit, expression, width=12, height=8):
    """Buckets of a histogram over time."""
    options = {"calculate": False, "yAxis": {"unit": unit}, "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64}}
    return panel("heatmap", title, description, unit, [(expression, "{{le}}")], width, height, None, options)


def row(title):
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": COLUMNS, "h": 1}}


def place(panels):
    """Numbers the panels and lets them flow, a line at a time."""
    x = y = tallest = 0
    for number, made in enumerate(panels, 1):
        at = made["gridPos"]
        if x + at["w"] > COLUMNS:
            x, y, tallest = 0, y + tallest, 0
        made["id"] = number
        at |= {"x": x, "y": y}
        x, tallest = x + at["w"], max(tallest, at["h"])
    return panels


def choice(name, label, query):
    """A variable filled from the labels of a metric; all by default."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }


def variables():
    source = {"name": "datasource", "label": "Data Source", "type": "datasource", "query": "prometheus", "current": {}}
    return [
        source,
        choice("job", "Prometheus job", "label_values(patrickstar_build_info, job)"),
        choice("instance", "Process", 'label_values(patrickstar_build_info{job=~"$job"}, instance)'),
        choice("job_id", "Job", "label_values(patrickstar_job_info{%s}, job_id)" % PROCESS),
    ]


def board(name):
    source = importlib.import_module("source." + name)
    made = {
        "uid": "patrickstar-" + name,
        "title": "patrickstar / " + source.TITLE,
        "description": source.DESCRIPTION,
        "tags": ["patrickstar"],
        "schemaVersion": 39,
        "version": source.VERSION,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "links": [{"type": "dashboards", "title": "patrickstar", "tags": ["patrickstar"], "asDropdown": False, "keepTime": True, "includeVars": True}],
        "annotations": {"list": []},
        "templating": {"list": variables()},
        "panels": place(source.PANELS),
    }
    return json.dumps(made, indent=1) + "\n"


def main():
    stale = []
    for name in BOARDS:
        path, text = HERE / "boards" / (name + ".json"), board(name)
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        elif not path.is_file() or path.read_text() != text:
            stale.append(path.name)
    if stale:
        sys.exit("not what source/ says: %s: run python3 dashboards/build.py" % ", ".join(stale))


if __name__ == "__main__":
    # The boards import this file by its name: it must not be there twice.
    sys.modules["build"] = sys.modules["__main__"]
    sys.path.insert(0, str(HERE))
    sys.dont_write_bytecode = True
    main()
