"""Conversations: records read as messages, messages laid out as text, text as tokens of which some are learnt."""
