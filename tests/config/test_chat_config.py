"""Settings of how chats are learned."""

import pytest
from pydantic import ValidationError

from maxlm.config.data import ChatConfig


@pytest.mark.parametrize("train_on", ["all", "last", (1,), (-1, "Ann")])
def test_answers_are_named_by_word_number_or_speaker(train_on):
    assert ChatConfig(train_on=train_on).train_on == train_on


@pytest.mark.parametrize("train_on", ["first", [], [0], [True], [1.5], [""], 1, None])
def test_other_answers_are_refused_in_one_sentence(train_on):
    with pytest.raises(ValidationError, match="must be all, last, or a list of names and of numbers") as error:
        ChatConfig(train_on=train_on)
    assert error.value.error_count() == 1
