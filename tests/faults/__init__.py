"""Faults done to real runs on purpose: killed, damaged, out of disk; then resumed and compared bit by bit."""
