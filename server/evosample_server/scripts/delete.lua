-- Turns a head into a tombstone: from here on nothing can be read from or written to the experiment.
-- KEYS: head. ARGV: uid. Returns 1, or 0 if there is no such experiment.
if redis.call('HGET', KEYS[1], 'deleted_uid') == ARGV[1] then
  return 1 -- sent again: the first answer got lost
end
if redis.call('HGET', KEYS[1], 'uid') ~= ARGV[1] then
  return 0
end
redis.call('HSET', KEYS[1], 'uid', '', 'deleted_uid', ARGV[1], 'state', 'deleted')
return 1
