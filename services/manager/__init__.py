"""The manager: takes idle stages down to no replica, and brings them back when they are wanted."""
