"""The search page, from a clone of the repository and as a Hugging Face Space: see `ieft/search/page_command.py`."""

from ieft.search.page_command import main

if __name__ == "__main__":
    main()
