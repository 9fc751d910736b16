def search_page(**k):
    return str(k)
