"""A dataset's own completions as rollouts that nobody sampled: what supervised fine-tuning trains on."""

from pidistill.errors import InputError
from pidistill.tokenizers import ChatTokenizer
from pidistill.types import Example, PromptPair, Rollout


def demonstration(example: Example, prompts: PromptPair, tokenizer: ChatTokenizer, group: int = 0) -> Rollout:
    """The ids that a policy would have sampled to say ``example.completion``; messages between its turns are observations.

    Raises:
        InputError: the example has no completion, or none of its messages is an assistant turn.
    """
    if not any(message["role"] == "assistant" for message in example.completion or []):
        raise InputError(f"{example.id} has no assistant turn to learn from; check the dataset's completion key")
    history, observations = list(example.messages), []
    completion: list[int] = []
    policy_mask: list[bool] = []
    for message in example.completion:
        if message["role"] != "assistant":
            observations.append(message)
            continue
        if observations:
            ids = tokenizer.encode_observations(history, observations, example.tools)
            completion += ids
            policy_mask += [False] * len(ids)
            history += observations
            observations = []
        ids = tokenizer.encode_turn(history, message, example.tools)
        completion += ids
        policy_mask += [True] * len(ids)
        history.append(message)
    return Rollout(
        example=example,
        prompts=prompts,
        completion=completion,
        policy_mask=policy_mask,
        sampled_logprobs=None,
        sampled_by="student",
        group=group,
        stop_reason="done",
        turns=list(example.completion),
    )
