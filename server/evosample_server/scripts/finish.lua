-- Marks a rank as finished; with the last one the epoch is sealed: OPEN -> SEALED.
-- KEYS: head, claims, finished. ARGV: uid, plan_id, generation, rank, claim, epoch
-- Returns 'ok' (also when repeated after the epoch has ended), 'gone', 'superseded' or 'closed'.
local h = redis.call('HMGET', KEYS[1], 'uid', 'plan_id', 'state', 'generation', 'world_size', 'epoch')
if h[1] ~= ARGV[1] then
  return 'gone'
end
if h[4] ~= ARGV[3] or redis.call('HGET', KEYS[2], ARGV[4]) ~= ARGV[5] then
  return 'superseded'
end
if tonumber(h[6]) > tonumber(ARGV[6]) then
  return 'ok'
end
if h[2] ~= ARGV[2] or (h[3] ~= 'open' and h[3] ~= 'sealed') then
  return 'closed'
end
redis.call('SADD', KEYS[3], ARGV[4])
if redis.call('SCARD', KEYS[3]) == tonumber(h[5]) then
  redis.call('HSET', KEYS[1], 'state', 'sealed')
end
return 'ok'
