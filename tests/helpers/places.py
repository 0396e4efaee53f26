"""Where things lie: the checkout, the tests with their fixtures and helpers, the embedded pictures."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
FIXTURES = TESTS / "fixtures"
HELPERS = TESTS / "helpers"
EMBEDDED = ROOT / "instseg_jax" / "data" / "embedded"
