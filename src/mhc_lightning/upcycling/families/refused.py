"""Blocks that cannot be made wide with the same function, and why."""

_NORMS_THE_SUM = "they norm the sum x + F(x) itself, and the streams hold no such sum"

# By the name of a class of blocks.
REASONS = {
    **dict.fromkeys(
        (
            "BertLayer",
            "RobertaLayer",
            "XLMRobertaLayer",
            "CamembertLayer",
            "ElectraLayer",
            "DebertaV2Layer",
            "AlbertLayer",
            "MPNetLayer",
            "BartEncoderLayer",
            "BartDecoderLayer",
        ),
        _NORMS_THE_SUM,
    ),
    "Gemma3nTextDecoderLayer": (
        "they predict and correct four streams of their own (AltUp) and add to none of them"
    ),
    "Gemma4TextDecoderLayer": (
        "they multiply all that the blocks before them have added by a number"
    ),
    "MiniMaxDecoderLayer": (
        "they go on with their normed input, in place of what the blocks before them have added"
    ),
}
