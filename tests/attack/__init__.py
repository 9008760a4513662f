"""Whether anything that one client sends can stop the service, slow others or take its memory."""
