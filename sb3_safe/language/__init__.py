"""All that is special about text: policy, key/value slots, rollout buffer."""

from sb3_safe.language.buffer import SegmentBuffer
from sb3_safe.language.policy import LanguagePolicy

__all__ = ["LanguagePolicy", "SegmentBuffer"]
