"""The name by which transformers passes a cache, as an argument and as a result."""

from functools import cache


@cache
def cache_name() -> str:
    """`cache` since transformers 5.24, which warns of the other name; `past_key_values` before."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    fields = CausalLMOutputWithPast.__dataclass_fields__
    return "cache" if "cache" in fields else "past_key_values"
