"""Readers of the files that people have: texts, books, mailboxes, exported chats. Each is a plugin with one hook."""
