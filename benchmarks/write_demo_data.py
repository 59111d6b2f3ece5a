"""Write the demo's facts and word problems as files, for benchmarks/recipes/demo.yaml: to show, those that the demo
shows; to measure, none of those that it measures.

python benchmarks/write_demo_data.py OUTPUT
"""

import json
import sys
from pathlib import Path

from corda_lora.demo.facts import knowledge_questions, word_problems
from corda_lora.demo.run import BATCH, FACTS, MEASURED_FACTS, MEASURED_PROBLEMS, METER_FACTS, STEPS


def main(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    facts = knowledge_questions()
    files = {
        "knowledge_context": facts[:FACTS],
        "knowledge_test": facts[FACTS + METER_FACTS + MEASURED_FACTS :],
        "problems_train": word_problems(STEPS * BATCH, seed=0),
        "problems_test": word_problems(MEASURED_PROBLEMS + 192, seed=1)[MEASURED_PROBLEMS:],
    }
    for name, rows in files.items():
        (output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
