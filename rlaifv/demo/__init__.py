"""The demo world: drawn scenes, a tiny policy that hallucinates, a tiny labeller, and their data.

Everything here is made from a seed by `python -m rlaifv.demo build`.
"""

from pathlib import Path

PATH = Path(__file__).parent
"""The folder that holds the shipped files named below."""

POLICY = "policy"
"""Model folder (Hugging Face layout) of the policy that the demo trains."""

LABELLER = "labeller"
"""Model folder (Hugging Face layout) of the yes/no labeller."""

INSTRUCTIONS = "data/instructions.parquet"
"""Description requests about scenes, in the columns that the `prepare` stage reads."""

SELECTION = "data/selection.parquet"
"""Object benchmark that chooses checkpoints."""

TEST = "data/test.parquet"
"""Object benchmark that neither training nor selection looks at."""

VOCABULARY = "data/vocabulary.txt"
"""Object names and their synonyms, one class per line, the class name first."""
