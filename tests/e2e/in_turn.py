"""Runs scripts in turn in the same processes: in_turn.py FILE, which holds [[script, word, ...], ...] as JSON."""

import importlib
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from engine.cli import launch


def main(commands):
    for name, *words in commands:
        script = importlib.import_module(name)
        script.main(script.parse_args(words))
        logging.Logger.manager.loggerDict.clear()


if __name__ == "__main__":
    launch(main, lambda: json.loads(Path(sys.argv[1]).read_text()))
