"""Treat conversations as plain messages, before any tokenizer.

Enters: what a row, a model or an environment says. Leaves: messages in one form, calls, and texts for prompts and reports.
Read :mod:`pidistill.chat.messages` first. endpoint.py asks a server over HTTP, for judges and for teachers on a server.
"""
