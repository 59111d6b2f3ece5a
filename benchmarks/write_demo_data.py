"""Write the demo's facts and word problems as files, for benchmarks/recipes/demo.yaml.

python benchmarks/write_demo_data.py OUTPUT
"""

import json
import sys
from pathlib import Path

from corda_lora.demo.facts import knowledge_questions, word_problems
from corda_lora.demo.run import CONTEXT


def main(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    facts = knowledge_questions()
    files = {
        "knowledge_context": facts[:CONTEXT],
        "knowledge_test": facts[CONTEXT:],
        "problems_train": word_problems(800, seed=0),
        "problems_test": word_problems(256, seed=1),
    }
    for name, rows in files.items():
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
