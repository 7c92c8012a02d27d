"""What every engine is given to do, and the names of the tests.

Owns: numbers of tokens. Does not know: engines.
"""

CONTEXT = 4096
PROMPT, GENERATE = 512, 128
SHORT_PROMPT = 20
SHORT_TEXT = " ".join("abcdefghijklmnopqrst")  # 20 tokens in every vocabulary here
LONG_PROMPT = 2000
LONG_TEXT = " ".join("abcdefghijklmnopqrst" * (LONG_PROMPT // SHORT_PROMPT))
PROMPTS = (20, 64, 128, 256, 512, 1024)
DEPTHS = (0, 512, 1024, 2048, 4096)
CURVE_GENERATE = 32
PRODUCT_TOKENS = 128

PREFILL = f"prefill {PROMPT}"
DECODE = f"decode {GENERATE} at 0"
DECODE_AFTER = f"decode {GENERATE} after {PROMPT}"
FIRST = f"first token, prompt {SHORT_PROMPT}"
MEMORY_AFTER = f"memory, {PROMPT} read and {GENERATE} written"
PEAK = f"peak RSS, context {CONTEXT}"
RUN_PEAK = f"peak RSS, run, prompt {LONG_PROMPT}"
READ = "read a token"
LEFT = "processor time of the neighbour"
