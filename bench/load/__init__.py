"""The load: programs that run in a process of their own and cost as little as they can."""
