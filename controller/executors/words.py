"""What a stage said last, from its log."""


def last_words(text: str) -> str:
    """The last error line of a log, else its last line."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.partition("] ")[2] or line for line in lines if " ERROR " in line]
    return (errors or lines or ["it said nothing"])[-1][:500]
