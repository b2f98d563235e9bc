"""A reward model with code of its own, as it lies in a checkpoint's folder: written for transformers 4.

Its parts are those of RLHFlow/ArmoRM-Llama3-8B-v0.1: several objectives, mixed by a gate that reads the prompt at the
head of the assistant's message, an output with a field `score`, and an import that transformers 5 no longer has.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.models.llama.modeling_llama import LLAMA_INPUTS_DOCSTRING
from transformers.utils import ModelOutput, add_start_docstrings_to_model_forward


@dataclass
class GatedOutput(ModelOutput):
    rewards: torch.Tensor | None = None
    score: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class LlamaForGatedReward(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.objectives = nn.Linear(config.hidden_size, config.num_objectives, bias=False)
        self.post_init()
        identity = torch.zeros(config.num_objectives, config.num_objectives)
        identity[range(config.num_objectives), range(config.num_objectives)] = 1.0
        self.transform = nn.Parameter(identity, requires_grad=False)
        self.gate = nn.Linear(config.hidden_size, config.num_objectives)

    @add_start_docstrings_to_model_forward(LLAMA_INPUTS_DOCSTRING)
    def forward(self, input_ids=None, attention_mask=None, return_dict=None):
        return_dict = self.config.use_return_dict if return_dict is None else return_dict
        hidden = self.model(input_ids, attention_mask=attention_mask, return_dict=return_dict)[0]
        # The last token is the one before the first padding.
        last = torch.eq(input_ids, self.config.pad_token_id).int().argmax(-1) - 1
        last = last % input_ids.shape[-1]
        rows = torch.arange(len(input_ids))
        rewards = self.objectives(hidden[rows, last])
        gate = self.gate(hidden[rows, [self._assistant(ids) for ids in input_ids.tolist()]]).softmax(dim=-1)
        score = (gate * (rewards @ self.transform)).sum(dim=-1)
        return GatedOutput(rewards=rewards, score=score, logits=rewards)

    def _assistant(self, ids):
        pattern = self.config.assistant_pattern
        for start in range(len(ids) - len(pattern), -1, -1):
            if ids[start : start + len(pattern)] == pattern:
                return start
        raise ValueError("Token pattern not found in the list.")
