"""Other people's APIs, served here, so that programs written for them run with URL and key changed."""
