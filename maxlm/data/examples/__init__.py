"""Records of users' files as examples of post-training: chats, pairs, prompts, judged answers, steps."""
