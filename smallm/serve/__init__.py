"""`smallm serve`: a server of completions and of the web page. The only room that imports Starlette and uvicorn."""
