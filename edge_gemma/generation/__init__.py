"""From a prompt's ids to a reply: choosing tokens, one hypothesis or several, streamed text."""
